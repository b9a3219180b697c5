"""What a run prints, and that printing can do it no harm: broken streams, narrow terminals, foreign names."""

import contextlib
import fcntl
import io
import multiprocessing
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dreamer
import envs.dummy
import training.driver
import training.progress
import training.run
from agents.random import Random
from tests.factories import CONFIGS, ROOT, one_line_error
from tools import Ratio, UserError, guard_output, locked
from training.config import load_config
from training.console import encodable, print_line, shown
from training.logdir import best_return, placed, recorded, save_config
from training.outputs import Outputs
from training.progress import Ahead, Line, Progress, clock, fitted, number

OLDER = ROOT / "tests" / "data" / "logdirs" / "dreamerv3"
QUICK = "--task dummy_vector --agent random --steps 30 --eval_episode_num 0"  # a run without networks

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload([__name__])


def command(logdir, words):
    return ["--configs", "debug", "--logdir", str(logdir), *words.split()]


def run_with(prepare, logdir, words):
    """Run in a process of its own after `prepare()` there; return its exit status."""
    process = FORK.Process(target=_run_with, args=(prepare, command(logdir, words)))
    process.start()
    process.join(100)
    return process.exitcode


def _run_with(prepare, argv):
    os.setsid()
    prepare()
    guard_output()
    step = envs.dummy.Vector.step

    def talking(*args):
        print("an environment that talks")
        print("and complains", file=sys.stderr)
        return step(*args)

    envs.dummy.Vector.step = talking
    status = dreamer.main(argv)
    print("flushed at the end of the process")
    sys.exit(status)


# ---------------------------------------------------------------------------
# Streams that are broken


def closed():
    for stream in (0, 1, 2):
        os.close(stream)


def full():
    for stream in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream)


def unread():
    reader, writer = os.pipe()
    os.close(reader)
    for stream in (1, 2):
        os.dup2(writer, stream)


def hung_up():
    master, slave = pty.openpty()
    for stream in (0, 1, 2):
        os.dup2(slave, stream)
    os.close(master)


@pytest.mark.parametrize("prepare", [closed, full, unread, hung_up])
def test_a_run_whose_output_goes_nowhere_is_like_any_other(tmp_path, prepare):
    assert run_with(prepare, tmp_path / "run", f"{QUICK} --log_level debug") == 0
    saved = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)
    assert saved["counters"]["agent_steps"] == 30
    assert "an environment" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run_with(prepare, tmp_path / "run", f"{QUICK} --seed 1") == 2  # which it cannot say, either


def shell(line):
    """Run a line of bash in the checkout, PY standing for Python; return exit status and stderr."""
    environment = os.environ | {"PY": sys.executable, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


TALK = "import sys, tools; tools.guard_output(); print('x' * 99999); print('y', file=sys.stderr); sys.exit(3)"


@pytest.mark.parametrize("to", ["> /dev/full 2>&1", "2> /dev/full > /dev/full", ">&- 2>&-", "2>&1 | true"])
def test_the_end_of_the_process_does_not_fail_over_what_is_not_written(to):
    assert shell(f'"$PY" -c "{TALK}" {to}') == (3, "")


def test_a_file_does_not_take_the_place_of_a_stream_that_is_closed(tmp_path):
    code = f"import os, tools; tools.guard_output(); file = open('{tmp_path}/file', 'w'); print('x'); os.write(2, b'y')"
    assert shell(f'"$PY" -c "{code}" <&- >&- 2>&-') == (0, "")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "words, status",
    [("--help | true", 0), ("--help > /dev/full", 0), ("--enws 2 2> /dev/full", 2), ("--enws 2 2>&-", 2)],
)
def test_help_and_mistakes_keep_their_exit_status(words, status):
    assert shell(f'"$PY" dreamer.py {words}') == (status, "")


@pytest.mark.parametrize("stream", [None, io.TextIOWrapper(open("/dev/full", "wb", buffering=0))])  # noqa: SIM115
def test_a_line_for_a_stream_that_is_not_there_is_lost(stream):
    print_line("lost", stream)
    gone = io.StringIO()
    gone.close()
    print_line("lost", gone)


# ---------------------------------------------------------------------------
# What is foreign


@pytest.mark.parametrize(
    "text, line",
    [
        ("plain äöü 日本", "plain äöü 日本"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b[31mred\x07\x00", r"\x1b[31mred\x07\x00"),
        ("\x9b31m \u2028 \u202e \udc80", r"\x9b31m \u2028 \u202e \udc80"),
        (ValueError("in an error\n"), r"in an error\n"),
    ],
)
def test_what_is_not_printable_is_shown_as_python_writes_it(text, line):
    assert shown(text) == line


def test_what_an_encoding_lacks_is_spelled_out():
    assert encodable("1 \N{RIGHTWARDS ARROW} 2 \N{EN DASH} 日", "ascii") == r"1 -> 2 - \u65e5"
    stream = io.TextIOWrapper(io.BytesIO(), "latin-1")
    print_line("ä 日", stream)
    assert stream.buffer.getvalue() == b"\xe4 \\u65e5\n"


@pytest.mark.parametrize(
    "argv",
    [
        ["--\x1b[31menvs", "2"],
        ["--configs", "no\nsuch"],
        ["--config", "no\x1b]0;title\x07.yaml"],
        ["--task", "custom_no\ndreamer.py: forged:Env"],
        ["--from_checkpoint", "no\x1b[2J.pt"],
        ["--offline_traindir", "no\nsuch"],
    ],
)
def test_a_mistake_in_foreign_words_is_one_harmless_line(tmp_path, capfd, argv):
    assert dreamer.main([*command(tmp_path / "run", "--task dummy_vector"), *argv]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.removesuffix("\n").isprintable()
    assert not (tmp_path / "run").exists()


def test_names_of_files_and_texts_of_exceptions_reach_the_terminal_as_text(tmp_path, capfd):
    logdir = tmp_path / "a\x1b[31mb\nc"
    (logdir / "train_eps").mkdir(parents=True)
    (logdir / "train_eps" / "20200101T000000-\x1b[2J\n-5.npz").write_bytes(b"no episode")
    assert dreamer.main(command(logdir, QUICK)) == 0
    printed = capfd.readouterr()
    assert "skipped" in printed.err and r"a\x1b[31mb\nc" in printed.err
    assert all(line.isprintable() for line in (printed.out + printed.err).splitlines())


# ---------------------------------------------------------------------------
# The line on a terminal


class Screen(io.StringIO):
    """A stream that can pretend to be a terminal."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


CONTROLS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def painted(text):
    """Return what was painted on a line of its own, without what moves the cursor."""
    return [CONTROLS.sub("", part) for part in re.split(r"[\r\n]+", text) if CONTROLS.sub("", part)]


def open_terminal(columns):
    """Return both ends of a terminal of so many columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    os.set_blocking(master, False)
    return master, slave


def read_from(master, going):
    """Return all that comes to a terminal while `going()`."""
    printed = b""
    while True:
        last = not going()
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(master, 65536):
                printed += piece
        if last:
            return printed.decode()
        time.sleep(0.01)


def run_in_terminal(logdir, words, term="xterm"):
    """Run in a process on a terminal; return exit status and all that came to the terminal."""
    master, slave = open_terminal(80)
    process = FORK.Process(target=_run_in_terminal, args=(os.ttyname(slave), term, command(logdir, words)))
    process.start()
    text = read_from(master, process.is_alive)
    os.close(slave), os.close(master)
    return process.exitcode, text


def _run_in_terminal(name, term, argv):
    terminal = os.open(name, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    os.environ["TERM"] = term
    training.progress.REFRESH = 0.0
    _run_with(lambda: None, argv)


def test_a_terminal_has_one_line_and_is_left_as_it_was(tmp_path):
    words = "--task dummy_vector --agent random --steps 40 --eval_every 25"
    status, text = run_in_terminal(tmp_path / "run", words)
    assert status == 0, text
    lines = painted(text)
    assert "an environment that talks" in lines and "and complains" in lines  # above the line
    assert any(line.startswith("evaluating 1/2  62%") for line in lines)
    assert lines[-1] == "flushed at the end of the process"
    assert any(line.startswith("filming  100%") for line in lines) and lines[-2].startswith("done  100%")
    assert any("return" in line and "fps" in line and "ETA 0:00:" in line for line in lines)
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is shown


def test_a_terminal_that_can_do_nothing_gets_plain_lines(tmp_path):
    status, text = run_in_terminal(tmp_path / "run", QUICK, term="dumb")
    assert status == 0 and "\x1b" not in text and "done  100%  step 30/30" in text


SHOW = """
import tools, training.progress
tools.guard_output()
line = training.progress.Line()
line.show([(0, "learning"), (1, "45%"), (2, "ETA 1:02:03"), (3, "x" * 40), (4, "y" * 80)])
line.close()
"""


@pytest.mark.parametrize("columns, fields", [(6, 0), (40, 3), (80, 4), (200, 5)])
def test_the_line_fits_the_terminal(columns, fields):
    master, slave = open_terminal(columns)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW],
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment | {"TERM": "xterm"},
    )
    lines = painted(read_from(master, lambda: process.poll() is None))
    os.close(slave), os.close(master)
    assert process.returncode == 0 and lines and all(len(line) < columns for line in lines)
    assert lines[0] == "learn" if fields == 0 else len(lines[0].split("  ")) == fields


EVERYTHING = [
    (0, "evaluating 10/10"),
    (1, "45%"),
    (7, "step 123,456,789/200,000,000"),
    (4, f"{number(1512.4)} fps"),
    (5, f"{number(112.34)} updates/s"),
    (3, f"return {number(-1512.3)}"),
    (6, f"best {number(-1033.3)}"),
    (2, f"ETA {clock(99 * 3600)}"),
]


@pytest.mark.parametrize(
    "width, line",
    [
        (200, "  ".join(text for _, text in EVERYTHING)),
        (79, "evaluating 10/10  45%  1512 fps  112 updates/s  return -1512  ETA 99:00:00"),
        (39, "evaluating 10/10  45%  ETA 99:00:00"),
        (8, "evaluati"),
        (0, ""),
    ],
)
def test_what_matters_most_stays_where_room_is_short(width, line):
    assert fitted(EVERYTHING, width).plain == line


def test_eighty_columns_have_room_for_all_but_the_steps():
    fields = [(0, "learning"), *EVERYTHING[1:]]
    shown = fitted(fields, 79).plain
    assert shown == "learning  45%  1512 fps  112 updates/s  return -1512  best -1033  ETA 99:00:00"


@pytest.mark.parametrize(
    "value, text",
    [
        *[(0, "0.0"), (0.123, "0.12"), (-0.5, "-0.50"), (12.34, "12.3"), (512.4, "512"), (-1733, "-1733")],
        *[(12345, "12.3k"), (4.1e6, "4.1M"), (2e8, "200M"), (1e15, "1.0e+15"), (np.nan, "nan"), (-np.inf, "-inf")],
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    "seconds, text", [(None, "\N{EN DASH}"), (0, "0:00:00"), (3723.9, "1:02:03"), (359999, "99:59:59"), (4e5, "4d 15h")]
)
def test_durations_are_short(seconds, text):
    assert clock(seconds) == text


# ---------------------------------------------------------------------------
# What it says of a run


@pytest.fixture
def now(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(training.progress, "monotonic", lambda: now[0])
    return now


def drive(progress, now, name, seconds, fps, rate=0.0):
    """Let a run go on for some seconds."""
    for _ in range(seconds):
        now[0] += 1
        progress.update(name, progress.step + fps, progress.updates + int(rate))


def test_a_file_gets_a_plain_line_every_so_often(now):
    screen = Screen(terminal=False)
    progress = Progress(60_000, ahead=lambda: Ahead(60_000 - progress.step), stream=screen)
    progress.episode(512.34)
    progress.episode(-3.0)
    drive(progress, now, "learning", 61, 143, 3)
    first, second = screen.getvalue().splitlines()
    assert first == "learning  7%  step 4,290/60,000  143 fps  3.0 updates/s  return -3.0  best 512  ETA 0:06:29"
    assert second.startswith("learning  14%  step 8,580/60,000  143 fps")
    progress.close()
    assert screen.getvalue().count("\n") == 3 and "\x1b" not in screen.getvalue() and "\r" not in screen.getvalue()
    progress.close()
    assert screen.getvalue().count("\n") == 3


def test_a_few_milliseconds_tell_no_rate(now):
    """The first updates end a stage, compiling: then two of them and some frames are there after no time."""
    screen = Screen(terminal=False)
    progress = Progress(150_000, ahead=lambda: Ahead(150_000 - progress.step, 36_988), stream=screen)
    drive(progress, now, "prefill", 8, 256)
    with progress.stage("compiling"):
        now[0] += 60
    progress.update("learning", 2048, 0)
    now[0] += 0.004
    progress.update("learning", 2052, 2)
    progress.close()
    dash = "\N{EN DASH}"
    assert screen.getvalue().splitlines()[-1] == (
        f"learning  1%  step 2,052/150,000  {dash} fps  {dash} updates/s  ETA {dash}"
    )


def test_rates_are_recent_and_those_of_the_stage(now):
    progress = Progress(10_000, stream=Screen(False))
    drive(progress, now, "prefill", 20, 400)
    assert progress._since(10)[1] / progress._since(10)[0] == 400
    drive(progress, now, "learning", 3, 20, 2)
    seconds, frames, updates = progress._since(10)
    assert frames / seconds == 20 and updates / seconds == 2
    drive(progress, now, "learning", 30, 50, 5)
    seconds, frames, updates = progress._since(10)
    assert frames / seconds == 50 and updates / seconds == 5


def test_an_evaluation_or_a_compilation_slows_no_rate(now):
    progress = Progress(10_000, stream=Screen(False))
    drive(progress, now, "learning", 5, 100, 10)
    with progress.stage("evaluating"):
        now[0] += 500
        with progress.stage("saving"):
            now[0] += 100
    drive(progress, now, "learning", 1, 100, 10)
    seconds, frames, updates = progress._since(10)
    assert (frames / seconds, updates / seconds) == (100, 10)
    progress.begin("compiling")
    now[0] += 300
    drive(progress, now, "learning", 1, 100, 10)
    seconds, frames, _ = progress._since(10)
    assert frames / seconds == pytest.approx(100, rel=0.2)
    assert progress.spent["evaluating"] == (1, 600) and progress.waited == pytest.approx(900, abs=2)


def test_the_time_left_of_a_prefill_is_not_known_before_an_update_was_measured(now):
    ahead = {"value": Ahead(10_000, 4_000)}
    progress = Progress(10_000, ahead=lambda: ahead["value"], stream=Screen(False))
    drive(progress, now, "prefill", 10, 100)
    assert progress.seconds_left() is None
    ahead["value"] = Ahead(9_000, 4_000)
    drive(progress, now, "learning", 1, 0)
    drive(progress, now, "learning", 20, 10, 4)
    assert progress.seconds_left() == pytest.approx(1000)  # 4000 updates, four a second
    ahead["value"] = Ahead(9_000)  # an agent that learns nothing
    assert progress.seconds_left() == pytest.approx(900)


def test_the_time_left_knows_the_evaluations_to_come(now):
    progress = Progress(10_000, ahead=lambda: Ahead(900, 0, {"evaluating": 3, "saving": 7}), stream=Screen(False))
    drive(progress, now, "learning", 20, 100)
    assert progress.seconds_left() == pytest.approx(9)
    for seconds in (10, 30):
        with progress.stage("evaluating"):
            now[0] += seconds
    assert progress.seconds_left() == pytest.approx(9 + 3 * 20)


def test_the_line_of_an_agent_of_stages_tells_the_share_and_the_time_left_of_one(now):
    screen = Screen(terminal=False)
    progress = Progress(1_000, stream=screen)
    for share in (0.2, 0.3, 0.4):
        progress.update("V", 100, 7, share)
        now[0] += 40
    assert progress.seconds_left() == pytest.approx((120 / 0.2) * 0.6)  # a fifth of it in three times 40 seconds
    lines = screen.getvalue().splitlines()
    assert lines[0].startswith("V  30%  step 100/1,000") and lines[1].endswith("ETA of V 0:04:00")
    progress.update("M", 100, 8, 0.0)
    assert progress.seconds_left() is None
    progress.update("done", 100, 9, 1.0)
    progress.close()
    assert "ETA" not in screen.getvalue().splitlines()[-1]


def test_pretraining_without_frames_has_a_time_left(now):
    progress = Progress(10_000, ahead=lambda: Ahead(10_000, 50), stream=Screen(False))
    drive(progress, now, "learning", 5, 0, 1)
    assert progress.seconds_left() == pytest.approx(50)


def test_a_stage_that_takes_long_is_told_once_to_a_file_and_always_to_a_terminal(now, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    screen, terminal = Screen(False), Screen(True)
    for stream in (screen, terminal):
        progress = Progress(100, stream=stream)
        progress.begin("compiling")
        progress.update("learning", 50, 1)
        for _ in range(2):
            with progress.stage("evaluating"), progress.stage("saving"):
                pass
        progress.close()
    assert screen.getvalue().splitlines()[:2] == ["compiling at step 0", "evaluating at step 50"]
    assert [line.split()[0] for line in painted(terminal.getvalue())] == [
        *["compiling", "evaluating", "saving", "evaluating", "saving"],
        *["learning"] * 2,
    ]


def test_a_message_stands_above_the_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    screen = Screen(True)
    line = Line(screen)
    line.show([(0, "learning")])
    long = "a line that is longer than the terminal is wide stays one line [bold]"
    line.message(long)
    line.interject("at once")
    line.close()
    assert painted(screen.getvalue())[:3] == ["learning", long, "learning"]


def test_the_line_costs_little(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    progress = Progress(10**6, ahead=lambda: Ahead(10**6, 10**6), stream=Screen(True))
    start = time.process_time()
    for update in range(5000):
        progress.update("learning", update, update)
    assert (time.process_time() - start) / 5000 < 2e-4
    progress.close()


# ---------------------------------------------------------------------------
# Starting, going on, stopping


def run(logdir, words, capfd):
    """Run in this process; return the exit status and the lines on stderr."""
    capfd.readouterr()
    status = dreamer.main(command(logdir, words))
    return status, capfd.readouterr().err.splitlines()


def test_a_run_says_what_it_is(tmp_path, capfd):
    words = "--task dummy_multi --size 16 16 --steps 60 --eval_every 0 --encoder.mlp_keys state --eval_episode_num 0"
    status, lines = run(tmp_path / "run", words, capfd)
    assert status == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines[:9])
    assert rows["task"] == "dummy_multi, dreamerv3, seed 0"
    assert rows["runs on"] == "cpu, float32, not compiled"
    assert re.fullmatch(r"[\d,]{5,} parameters", rows["model"])
    assert rows["images"] == "image 16x16x3" and rows["vectors"] == "state 2 numbers"
    assert rows["left out"] == "phase by --encoder.mlp_keys"
    assert rows["actions"] == "mode one of 3, move 2 in [-1, 1]"
    assert re.fullmatch(r"210 steps of [\d.]+ KB, \d+ MiB of memory", rows["replay"])
    assert rows["planned"] == "40 agent steps of prefill, 5 updates until frame 60"
    assert lines[9].split()[-1] == "fresh"
    saved = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)
    assert saved["counters"]["updates"] == 5
    status, lines = run(tmp_path / "run", f"{words} --steps 90 --train_ratio 16 --batch_size 5", capfd)
    assert any(line.endswith("/run: resuming at step 60") for line in lines)
    assert "changed: steps 60 → 90, batch_size 4 → 5, train_ratio 8.0 → 16.0" in lines
    status, lines = run(tmp_path / "other", f"{words} --log_level warning", capfd)
    assert status == 0 and not lines


def test_the_updates_ahead_are_those_that_are_made():
    for words in ({"ratio": 0.25}, {"ratio": 0.3, "burst": 7}, {"ratio": 0.2, "first": 9}):
        clock, made = Ratio(**words), []
        planned = clock.left(100, 40)
        for step in range(40, 101):
            while clock.due(step):
                if len(made) == 5:
                    assert clock.left(100, step) == planned - 5
                made.append(step)
                clock.tick()
        assert planned == len(made) > 5 and clock.left(100, 100) == 0


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Return the logdir of a run at its end."""
    logdir = tmp_path_factory.mktemp("ended") / "run"
    assert dreamer.main(command(logdir, "--task dummy_vector --steps 50 --eval_every 0")) == 0
    return logdir


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_at_its_end_says_so_and_does_nothing(ended, capfd, monkeypatch):
    before = contents(ended)
    monkeypatch.setattr(dreamer, "wire", lambda *_: pytest.fail("something was done"))
    words = "--task dummy_vector --steps 50 --eval_every 0"
    status, lines = run(ended, words, capfd)
    assert status == 0
    assert lines == [f"{ended}: already finished at step 50: nothing to do (raise --steps, or give another --logdir)"]
    status, lines = run(ended, f"{words} --batch_size 7", capfd)
    assert status == 0 and lines[0] == "changed: batch_size 4 → 7"
    assert contents(ended) == before


def test_an_evaluation_that_a_kill_has_prevented_is_played_then(ended, tmp_path, capfd):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    (tmp_path / "scores.jsonl").write_text('{"step": 50, "mode": "eval", "score": 1.0, "length": 2}\n')  # of two
    status, lines = run(tmp_path, "--task dummy_vector --steps 50 --eval_every 0", capfd)
    assert status == 0 and any("the last evaluation is to come" in line for line in lines)
    assert any("eval_return" in line for line in lines)


OTHERS = {
    "--task dummy_discrete": "dummy_vector",
    "--seed 3": "0",
    "--action_repeat 2": "1",
    "--version planet": "dreamerv3",
}


@pytest.mark.parametrize("words", OTHERS)
@pytest.mark.parametrize("has", ["a checkpoint", "its configuration alone"])
def test_a_logdir_belongs_to_one_run(ended, tmp_path, capfd, words, has):
    if has == "a checkpoint":
        shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
        (tmp_path / "config.yaml").unlink()
    else:
        shutil.copy(ended / "config.yaml", tmp_path)
    before = contents(tmp_path)
    status, lines = run(tmp_path, f"--task dummy_vector --steps 90 {words}", capfd)
    assert status == 2 and len(lines) == 1
    assert f"{words}: the run in {tmp_path} has {OTHERS[words]}; give another --logdir" in lines[0]
    fits = words.startswith(("--seed", "--action_repeat"))  # a checkpoint of another task or version may not
    assert ("--from_checkpoint" in lines[0]) == (has == "a checkpoint" and fits)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("steps, lost", [(50, False), (90, False), (90, True)])
def test_other_sizes_than_were_learned_with_are_refused_by_their_flag(ended, tmp_path, capfd, steps, lost):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    if lost:
        (tmp_path / "latest.pt").unlink()
    before = contents(tmp_path)
    status, lines = run(tmp_path, f"--task dummy_vector --steps {steps} --eval_every 0 --rssm.deter 64", capfd)
    assert status == 2 and len(lines) == 1 and contents(tmp_path) == before
    assert "--rssm.deter 64" in lines[0] and "32" in lines[0] and "give another --logdir" in lines[0]


def test_an_explorer_that_is_added_is_named(ended, tmp_path, capfd):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    status, lines = run(tmp_path, "--task dummy_vector --steps 90 --expl_behavior plan2explore", capfd)
    assert status == 2 and "--expl_behavior plan2explore (it was greedy): the checkpoint is of another" in lines[0]


def test_a_checkpoint_that_is_gone_is_said(ended, tmp_path, capfd):
    shutil.copytree(ended, tmp_path, dirs_exist_ok=True)
    (tmp_path / "latest.pt").unlink()
    status, lines = run(tmp_path, "--task dummy_vector --steps 50 --eval_every 0", capfd)
    assert status == 0
    (warning,) = [line for line in lines if "warning" in line]
    assert f"{tmp_path / 'latest.pt'} is gone: the run begins at step 0 and adds to scores.jsonl" in warning


def test_an_older_logdir_names_no_version_and_goes_on(tmp_path, capfd):
    folder = shutil.copytree(OLDER.with_name("dreamerv2"), tmp_path / "run")
    words = [
        "--config",
        str(folder / "config.yaml"),
        "--logdir",
        str(folder),
        "--steps",
        "65",
        "--eval_episode_num",
        "0",
    ]
    assert dreamer.main([*words, "--version", "mine"]) == 0, capfd.readouterr().err
    assert recorded(folder).version == "mine" and recorded(OLDER.with_name("dreamerv2")).version == "dreamerv2"


def test_keys_that_are_gone_from_the_configuration_are_named_and_ignored(tmp_path, capfd):
    folder = shutil.copytree(OLDER, tmp_path / "run")
    with open(folder / "config.yaml", "a") as file:
        file.write("gone_key: 3\n")
    dreamer.load_agent(folder, "cpu")
    line = capfd.readouterr().err.splitlines()[0]
    assert "config.yaml: ignored keys that this version does not know: gone_key" in line
    assert "unknown key" in one_line_error(load_config, ["--config", str(folder / "config.yaml")], CONFIGS)


def test_a_run_that_is_refused_at_the_last_moment_has_made_nothing(tmp_path, capfd, monkeypatch):
    def taken(logdir):
        raise UserError(f"{logdir}: another run is writing there")

    monkeypatch.setattr(training.run, "locked", taken)  # as by one that has made the logdir a moment before
    status, lines = run(tmp_path / "new" / "run", QUICK, capfd)
    assert status == 2 and "another run" in lines[-1]
    assert not (tmp_path / "new").exists()
    monkeypatch.undo()
    (tmp_path / "mine").mkdir()
    with locked(tmp_path / "mine"):
        assert run(tmp_path / "mine", QUICK, capfd)[0] == 2
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize("words, unit", [(QUICK, "step"), (f"{QUICK} --prefill 0", "update")])
def test_a_signal_is_acknowledged_at_once(tmp_path, capfd, monkeypatch, words, unit):
    act, count = Random.act, [0]

    def interrupted(*args):
        count[0] += 1
        if count[0] == 20:
            os.kill(os.getpid(), signal.SIGINT)
            said = capfd.readouterr().err
            assert f"SIGINT: the run saves and ends after this {unit} (" in said
            assert ("without waiting for an environment" in said) == (unit == "step")
        return act(*args)

    monkeypatch.setattr(Random, "act", interrupted)
    status, _ = run(tmp_path / "run", words, capfd)
    assert status == 128 + signal.SIGINT and (tmp_path / "run" / "latest.pt").exists()


def test_a_signal_during_compilation_says_what_is_waited_for_and_a_second_ends_the_run(tmp_path, capfd, monkeypatch):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        said = capfd.readouterr().err
        assert "SIGINT: compiling, which can take minutes: the run saves and ends after this update (again: " in said
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the second signal was not heeded")

    stages = [("compiling", 0.0)]
    assert Outputs.compiles(SimpleNamespace(progress=SimpleNamespace(stages=stages)))
    assert not Outputs.compiles(SimpleNamespace(progress=SimpleNamespace(stages=[*stages, ("evaluating", 0.0)])))
    monkeypatch.setattr(Random, "act", interrupted)
    monkeypatch.setattr(Outputs, "compiles", lambda out: True)
    status, lines = run(tmp_path / "run", QUICK, capfd)
    assert status == 128 + signal.SIGINT and "ended at once; " in lines[-1]


def test_the_best_return_so_far_is_read_from_the_scores(tmp_path):
    assert best_return(tmp_path) is None
    lines = [
        '{"mode": "train", "score": 3.5}',
        '{"mode": "eval", "score": 9}',
        '{"mode": "train", "score": "nan"}',
        "{",
    ]
    (tmp_path / "scores.jsonl").write_text("\n".join([*lines, '{"mode": "train", "score": 1}']))
    assert best_return(tmp_path) == 3.5


# ---------------------------------------------------------------------------
# Placeholders


def place(logdir, words=""):
    return placed(load_config(["--logdir", logdir, *words.split()], CONFIGS)).logdir


def test_placeholders_of_the_logdir_are_filled_in():
    words = "--configs planet --task bsuite_catch/0 --seed 7"
    assert place("/runs/{task}_{version}/{seed}", words) == "/runs/bsuite_catch-0_planet/7"
    assert place("/{task}", "--task custom_my.module:Env") == "/custom_my.module-Env"
    assert re.fullmatch(r"/\d{8}T\d{6}", place("/{timestamp}"))
    assert place("/{{seed}}/{{{seed}}}") == "/{seed}/{0}"


@pytest.mark.parametrize("logdir", ["/{tsk}", "/{}", "/{", "/}", "/{task", "/{task.x}", "/{task!r}"])
def test_a_placeholder_that_there_is_not_is_one_line(logdir):
    message = one_line_error(place, logdir)
    assert message.startswith(f"--logdir {logdir}: no placeholder") and "{timestamp}" in message and "{{" in message


def test_a_logdir_is_absolute_and_survives_its_own_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert place("~/run") == place("run") == str(tmp_path / "run")
    config = placed(load_config(["--logdir", "a{{b}}"], CONFIGS))
    save_config(config, tmp_path)
    assert placed(load_config(["--config", str(tmp_path / "config.yaml")], CONFIGS)) == config


@pytest.mark.parametrize("preset", ["planet", "dreamerv1", "dreamerv2", "dreamerv3_2023"])
def test_presets_of_older_forms_name_their_version(preset):
    assert load_config(["--configs", preset], CONFIGS).version == preset
