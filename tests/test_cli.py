"""The command line as a newcomer meets it: without packages, installed by pip, cleaned up."""

import os
import pathlib
import re
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest

import dreamer
from tools import UserError
from training import installed
from training.config import CONFIGS, beside, help_text, load_config

ROOT = pathlib.Path(__file__).parents[1]


def run(*words, cwd=ROOT, **env):
    """Run a command; return the completed process."""
    words = list(map(str, words))
    return subprocess.run(words, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=60)


# Packages


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTED = re.compile(r"\bpython3?\s(-m\s(?:benchmarks|tests)[\w.]+|[\w/]+\.py)\b")
BARE = {"docs/architecture.py"}  # needs nothing but Python
PROGRAMS = {" ".join(word.split()) for page in PAGES for word in STARTED.findall(page.read_text())} - BARE
PROGRAMS = {program for program in PROGRAMS if program.startswith("-m") or (ROOT / program).is_file()}


def test_the_programs_that_the_pages_name_are_found():
    assert {"dreamer.py", "export.py", "doctor.py", "benchmarks/attack.py", "-m tests.golden"} <= PROGRAMS


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_without_packages_one_line_says_what_to_run(program, tmp_path):
    words = program.split() if program.startswith("-m") else [ROOT / program]
    done = run(sys.executable, "-S", *words, "--help", cwd=ROOT if words[0] == "-m" else tmp_path)  # no site-packages
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{program}: torch, ") and done.stderr.count("\n") == 1
    assert f".venv/bin/python {program}" in done.stderr
    assert "make .venv/core" in done.stderr or "source .venv/bin/activate" in done.stderr


@pytest.mark.parametrize("program", ["dreamer.py", "sweep.py", "export.py", "inference_video.py", "doctor.py"])
def test_help_fits_a_screen(program):
    done = run(sys.executable, ROOT / program, "--help", COLUMNS="200")
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 100


def test_packages_that_are_there_are_named_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "ROOT", str(tmp_path))
    assert installed.problem("dreamer.py") == ""
    monkeypatch.setattr(installed, "is_there", lambda name: name != "rich")
    assert installed.problem("dreamer.py").startswith(
        f"rich is not installed for {sys.executable}: run make .venv/core"
    )
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "core").touch()
    assert installed.problem("a.py").endswith("run .venv/bin/python a.py, or source .venv/bin/activate first")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert "pip install -r requirements.txt" in installed.problem("dreamer.py")
    monkeypatch.setattr(installed, "PYTHON", (3, 99))
    assert "Python 3.99 or newer is needed" in installed.problem("dreamer.py")


def test_what_is_demanded_is_what_the_requirements_pin():
    names = {"opencv-python-headless": "cv2", "ruamel.yaml": "ruamel.yaml"}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    core = {names.get(name, name) for name in pinned} - {"pygame-ce", "imageio-ffmpeg"}  # these, by others
    assert core == set(installed.NEEDED)


@pytest.mark.parametrize("code", ["import tools, dreamer", "import dreamer"])
def test_load_agent_beside_a_users_file_of_our_name_says_which_to_rename(code, tmp_path):
    (tmp_path / "tools.py").write_text("mine = 1\n")
    (tmp_path / "export.py").write_text("mine = 1\n")
    (tmp_path / "models").mkdir()  # without Python files it is no module
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    *_, line = done.stderr.splitlines()
    assert line.startswith(f"ImportError: {tmp_path / 'tools.py'}: rename it") and done.returncode == 1
    (tmp_path / "tools.py").unlink()
    assert run(sys.executable, "-c", "import export, dreamer", cwd=tmp_path, PYTHONPATH=str(ROOT)).returncode == 0


@pytest.mark.parametrize("words", [["."], ["-e", "."]])
def test_pip_is_told_in_one_line_that_nothing_is_to_be_installed(tmp_path, words):
    if PathFinder.find_spec("pip") is None:  # importlib.util's asks setuptools, which then hides itself from compilers
        pytest.skip("there is no pip")
    quiet = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    quiet += ["--target", tmp_path]
    done = run(sys.executable, "-m", "pip", "install", *quiet, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    (said,) = (line for line in done.stderr.splitlines() if "make .venv/core" in line)
    assert "run from its folder" in said and f"PYTHONPATH={ROOT}" in said


# Presets of one's own


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("""
# what I try
cave:  # my cave
  include: size1m
  task: custom_cave:Cave
  size: [96, 96]
wide: {.*\\.units: 99, steps: 7}
first: {last: true, steps: 8, task: dummy_vector}
""")
    return file


def load(*words):
    return load_config(list(map(str, words)), CONFIGS)


def refused(*words):
    with pytest.raises(UserError) as caught:
        load(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_presets_of_ones_own_stack_with_the_others(mine):
    config = load("--configs", "wide", "cave", "--presets", mine)
    assert (config.task, config.size, config.steps) == ("custom_cave:Cave", (96, 96), 7)
    assert config.actor.units == 64 and load("--configs", "cave", "wide", "--presets", mine).actor.units == 99
    assert load("--presets", mine, "--configs", "debug", "cave").task == "custom_cave:Cave"
    assert load("--presets", mine, "--configs", "debug", "cave").rssm.deter == load("--configs", "debug").rssm.deter
    assert load("--presets", mine) == load()


def test_a_preset_that_is_last_lies_over_all_but_their_task(mine):
    config = load("--presets", mine, "--configs", "first", "wide", "cave")
    assert (config.steps, config.task) == (8, "custom_cave:Cave")
    assert load("--presets", mine, "--configs", "first", "--steps", "9").steps == 9
    assert load("--presets", mine, "--configs", "first").task == "dummy_vector"


@pytest.mark.parametrize(
    "text, said",
    {
        "cave: {stepz: 3}": "cave: stepz: unknown key, did you mean steps?",
        "cave: {steps: x}": "cave: steps: expected a whole number, got 'x'",
        "cave: {include: debgu}": "include: debgu: unknown preset, did you mean debug?",
        "cave: {last: 1}": "cave: last: expected true or false, got 1",
        "debug: {steps: 3}": "debug: this name is taken, give the preset another",
        "defaults: {steps: 3}": "defaults: this name is taken",
        "# nothing": "expected presets",
        "- steps": "expected a name and a colon",
        "cave: [1": "line ",
    }.items(),
)
def test_a_wrong_preset_of_ones_own_is_one_line_that_names_the_file(mine, text, said):
    mine.write_text(text)
    message = refused("--presets", mine, "--configs", "cave")
    assert message.startswith(f"{mine}: ") and said in message, message


@pytest.mark.parametrize("asked", [["--help"], ["--help", "CAVE"], ["--completion"]])
def test_help_and_completion_know_presets_of_ones_own(mine, asked, capsys):
    for words in (["--presets", mine, *asked], [*asked, f"--presets={mine}"]):
        with pytest.raises(SystemExit):
            load(*words)
        assert "cave" in capsys.readouterr().out


def test_a_file_of_presets_that_is_not_there_is_named():
    assert refused("--presets", "no.yaml") == "--presets no.yaml: No such file or directory"
    assert refused("--config", "no.yaml") == "--config no.yaml: No such file or directory"
    assert refused("--help", "--presets", "no.yaml") == "--presets no.yaml: No such file or directory"
    assert refused("--presets") == "--presets: missing value"


# A checkpoint and the config.yaml beside it


def test_a_checkpoint_is_as_the_file_beside_it_says_under_what_the_user_gave(tmp_path):
    file = tmp_path / "config.yaml"
    there = "--configs debug --task dummy_vector --rssm.deter 64 --logdir there --device cuda --script train --seed 3"
    load(*there.split()).save(file)
    config = beside(load("--seed", 4, "--logdir", "here", "--script", "eval_only"), file)
    assert (config.task, config.rssm.deter, config.rssm.hidden) == ("dummy_vector", 64, 16)
    assert (config.seed, config.logdir, config.device, config.script) == (4, "here", "auto", "eval_only")
    assert beside(load("--rssm.deter", 8), file).rssm.deter == 8
    assert beside(load(), tmp_path / "none.yaml") == load()


@pytest.mark.parametrize("task", ["custom_cave:Cave", "gym_cave:Cave-v0"])
def test_code_that_a_file_beside_a_checkpoint_names_is_not_imported_unless_the_user_names_it(task, tmp_path, capfd):
    (tmp_path / "latest.pt").write_bytes(b"")
    (tmp_path / "cave.py").write_text("raise SystemExit('run')")
    load("--task", task).save(tmp_path / "config.yaml")
    words = ["--script", "eval_only", "--from_checkpoint", str(tmp_path), "--logdir", str(tmp_path / "eval")]
    assert dreamer.main(words) == 2
    assert "names the module 'cave'" in capfd.readouterr().err
    assert dreamer.main([*words, "--task", task]) == 2
    assert "names the module" not in capfd.readouterr().err


def test_eval_only_needs_no_preset_again_and_tells_the_spread(tmp_path, capfd):
    there, here = tmp_path / "there", tmp_path / "here"
    words = "--configs debug --task dummy_vector --steps 20 --eval_every 0 --rssm.deter 64 --logdir"
    assert dreamer.main([*words.split(), str(there), "--eval_envs", "0"]) == 0
    assert not (there / "eval_eps").exists()
    words = f"--script eval_only --from_checkpoint {there}/latest.pt --eval_episode_num 3 --eval_envs 2 --logdir {here}"
    assert dreamer.main(words.split()) == 0
    said = capfd.readouterr().err
    assert re.search(r"eval_return \S+ over 3 episodes \(std \S+, min \S+, max \S+\)", said)
    assert load("--config", here / "config.yaml").rssm.deter == 64
    same = ["--configs", "debug", "--task", "dummy_vector", "--rssm.deter", "64"]
    for lost in ("nowhere", tmp_path):
        assert dreamer.main(["--logdir", str(there), "--from_checkpoint", str(lost), *same]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and "no such file; leave it out to go on from" in said


# --help


def test_help_has_an_example_first_and_shows_what_is_asked_for(capsys):
    lines = help_text(CONFIGS).splitlines()
    assert lines[2].startswith("example: python3 dreamer.py --configs ")
    load_config(lines[2].partition("dreamer.py ")[2].split(), CONFIGS)
    assert [line for line in lines if line.startswith(" ") and line[1] != " "] == [
        *(" The run", " Environments", " Data and clocks", " Exploration", " Networks", " World model", " Behavior"),
        *(" Planning", " Optimizers"),
    ]
    with pytest.raises(SystemExit):
        load_config(["--help", "lr", "Debug"], CONFIGS)
    shown = capsys.readouterr().out
    assert "--opt.lr 4e-05" in shown and "  debug " in shown and "--train_ratio" not in shown
    assert refused("--help", "qwxz").startswith("--help qwxz: there is no such key")


# The Makefile and the image


def test_cleaning_up_leaves_runs_alone():
    done = run("make", "-n", "clean")
    assert done.returncode == 0 and "rm -rf .venv" in done.stdout and "logdir" not in done.stdout


@pytest.mark.parametrize("name", [".venv", "logdir", ".git"])
def test_an_image_is_built_without_what_weighs_gigabytes(name):
    assert name in (ROOT / ".dockerignore").read_text().splitlines()


def test_what_compiles_nothing_does_not_import_the_compiler(tmp_path):
    code = """
import runpy, sys
sys.argv = ["dreamer.py", *sys.argv[1:]]
runpy.run_path("dreamer.py")["main"](sys.argv[1:])
print(sorted({"torch._dynamo", "sympy"} & sys.modules.keys()))
"""
    flags = ["--configs", "debug", "--task", "dummy_vector", "--steps", "60", "--logdir", tmp_path / "run"]
    done = run(sys.executable, "-c", code, *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
