"""Walk through README.md and docs/ as a newcomer does: run every command as it is printed, in a bare clone.

    python3 benchmarks/newcomer.py           # what takes seconds
    python3 benchmarks/newcomer.py --long    # trainings, too: each until its first update, then SIGTERM
    python3 benchmarks/newcomer.py --list    # what it would do with each command
    python3 benchmarks/newcomer.py --long docs/sweeps.md    # those of a page

The clone gets the packages of the Python that runs this as its .venv, which is not active before a page says so, and a
home of its own. A command that ends with another exit status than it should, or a training that leaves no checkpoint,
is named, and the exit status is 1. What needs what may not be here, or takes hours, is listed as not run.
"""

import argparse
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
PROGRAM = r"(?:python3?|\.venv/bin/\w+|make|pip|docker|tensorboard|wandb|source)"
BLOCK = re.compile(rf"^(?:    |\$ )({PROGRAM} .*)$")
INLINE = re.compile(rf"(?<!`)`({PROGRAM} [^`]+)`(?!`)")
NOT_RUN = {  # a pattern -> why a command is not run
    r"^docker": "needs docker",
    r"^wandb|--logger.*wandb|wandb\.txt": "needs Weights & Biases",
    r"--device cuda|--gpus": "needs a GPU",
    r"^tensorboard|tensorboard\.main": "serves until it is stopped",
    r"^make test|-m pytest": "is what runs this",
    r"^pip |bin/pip |-m venv|^make \.venv": "installs packages",
    r"custom_|mine\.yaml|PRESET|\bNAME\b|SEED=N|<\w+>|\bPATH\b|\bDIR\b|\.\.\.": "stands for commands of your own",
    r"benchmarks[/.](?!reading|plot_scores)": "takes minutes to hours",
    r"(plot_scores|--checkpoint|--from_checkpoint|train_offline)(?!.*logdir/quickstart)": "needs runs that are there",
}
AFTER = re.compile(r"checkpoint \./logdir/quickstart")  # which make demo has left
TRAINS = re.compile(r"(dreamer|sweep)\.py(?!.*--(help|completion))|^make demo")
LEARNED = {"model_loss", "vae_loss"}  # of Dreamer, and of what World Models learn first
STOPPED = 128 + signal.SIGTERM
PATIENCE = {"cheap": 900, "after": 900, "long": 1800}  # seconds


class Command(NamedTuple):
    """A command of a page, `active` where the environment is then active."""

    page: str
    line: int
    text: str
    active: bool

    @property
    def kind(self):
        """Return "cheap", "long", "after" for what comes after a training, or why it is not run."""
        for pattern, why in NOT_RUN.items():
            if re.search(pattern, self.text):
                return why
        if AFTER.search(self.text):
            return "after"
        return "long" if TRAINS.search(self.text) else "cheap"


def commands(root=ROOT, pages=PAGES):
    """Return the commands of pages in their order; an environment that README activates stays so on later pages."""
    found, active = [], False
    for page in pages:
        lines = (root / page).read_text(encoding="utf-8").splitlines()
        python = False
        for number, line in enumerate(lines, 1):
            python ^= line.startswith("```")
            block = None if python else BLOCK.match(line)
            texts = [block[1]] if block else INLINE.findall(line) * (not python)
            while block and texts[0].endswith("\\"):
                texts = [texts[0][:-1] + lines[number].strip()]
                number += 1
            for text in texts:
                text = re.sub(r"\s+# .*", "", text).strip()
                found.append(Command(page, number, text, active))
                active = active or text.startswith("source ")
    return found


def words_of(text, program):
    """Return the words that follow `program` in a command, or None if it does not run it."""
    words = shlex.split(text)
    at = [index for index, word in enumerate(words) if pathlib.Path(word).name == program]
    return words[at[0] + 1 :] if at else None


def clone(folder):
    """Make a bare clone of what is committed, with this Python's packages as its .venv; return its place."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "clone")], check=True)
    place = folder / "clone"
    (place / ".venv").symlink_to(sys.prefix)
    for file in [place / "requirements.txt", *(place / "requirements").glob("*.txt")]:
        os.utime(file, (0, 0))  # so that make finds the packages up to date
    (folder / "home").mkdir()
    return place


def environment(place, active):
    """Return the variables of a newcomer's shell."""
    mine = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")}
    paths = [path for path in mine["PATH"].split(os.pathsep) if path != os.path.join(sys.prefix, "bin")]
    paths = [str(place / ".venv" / "bin")] * active + paths
    return mine | {"PATH": os.pathsep.join(paths), "HOME": str(place.parent / "home")}


def run_cheap(command, place):
    """Run a command to its end; return what is wrong, or an empty text."""
    patience = PATIENCE[command.kind]
    process = subprocess.Popen(
        ["bash", "-c", command.text],
        cwd=place,
        env=environment(place, command.active),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = process.communicate(timeout=patience)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"took longer than {patience} s"
    return f"exit status {process.returncode}: {errors[-300:]}" if process.returncode else ""


def run_long(command, place):
    """Start a training, end it by SIGTERM after its first update; return what is wrong, or an empty text.

    Metrics are logged at every frame, so that the update is seen: nothing else is added to what the page says.
    """
    logs, files = sizes(place.parent, "metrics.jsonl"), sizes(place.parent, "latest.pt")
    text = command.text + " --log_every 1" * bool(re.search(r"(dreamer|sweep)\.py", command.text))
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {text}"],
            cwd=place,
            env=environment(place, command.active),
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        end = time.monotonic() + PATIENCE["long"]
        while process.poll() is None and not has_learned(place.parent, logs) and time.monotonic() < end:
            time.sleep(1)
        if running := process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        status = process.wait(120)
        errors.seek(0)
        said = errors.read()[-300:]
    expected = {STOPPED, -signal.SIGTERM, 2 if text.startswith("make") else STOPPED} if running else {0}
    if status not in expected:
        return f"exit status {status}: {said}"
    return "" if sizes(place.parent, "latest.pt").items() - files.items() else f"no checkpoint: {said}"


def sizes(folder, name):
    """Return {path: (bytes, time)} of the files of a name below a folder."""
    return {path: (path.stat().st_size, path.stat().st_mtime) for path in folder.rglob(name)}


def has_learned(folder, before):
    """Return True if a run below the folder has logged an update in what its log holds beyond `before`."""
    for path in folder.rglob("metrics.jsonl"):
        with open(path) as file:
            file.seek(before.get(path, (0, 0))[0])
            whole = [line for line in file if line.endswith("\n")]
        if any(not LEARNED.isdisjoint(json.loads(line)) for line in whole):
            return True
    return False


def main(argv=None):
    """Walk; return the exit status."""
    about, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=about, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="only tell what would be done")
    parser.add_argument("--long", action="store_true", help="run trainings until their first update")
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="README.md or docs/NAME.md (default: all)")
    options = parser.parse_args(argv)
    if unknown := set(options.pages) - set(PAGES):
        parser.error(f"no page {', '.join(sorted(unknown))}")
    found: dict[str, Command] = {}
    for command in commands():
        found.setdefault(command.text, command)
    found = {text: command for text, command in found.items() if command.page in (options.pages or PAGES)}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        place = None if options.list else clone(pathlib.Path(folder))
        for command in found.values():
            kind = command.kind
            runs = {"cheap": run_cheap, "after": run_cheap, "long": run_long}.get(kind)
            runs = runs if options.long or kind == "cheap" else None
            said = f"not run: {kind}" if kind not in PATIENCE else f"{kind}, not run"
            if runs and not options.list:
                problem = runs(command, place)
                wrong += bool(problem)
                said = f"WRONG: {problem}" if problem else "fine"
            print(f"{command.page}:{command.line}: {command.text}\n    {said}", flush=True)
    print(f"{len(found)} commands, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
