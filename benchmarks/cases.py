"""Run commands that once went wrong, each in a copy of its folder, and compare what becomes of them with what should.

    python3 benchmarks/cases.py                           # all of tests/data/cases
    python3 benchmarks/cases.py --only 'chw_*' 'reward_*'

A case is a folder with a `command.txt` for bash, in which `python dreamer.py` and `python inference_video.py` mean
those of this checkout, the files that the command needs, and `want`: a line of JSON with the situation in words, then a
line for each outcome that is right. An outcome may state

    exit    the status, or a list of statuses
    stderr stdout said   regular expressions for what was printed, `said` for either
    not     a regular expression for what must not be printed, beside a traceback or a warning of Python or NumPy
    files absent   patterns of files that must, or must not, be there at the end
    text    {file: regular expression} for what is written

`.` matches no line break and `^` any line's beginning. The first line may also state `timeout` in seconds, and `needs`,
a package without which the case is left out.
"""

import argparse
import concurrent.futures
import fnmatch
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from training import installed

if __name__ == "__main__":
    installed.demand("benchmarks/cases.py")  # before the first package is imported

from benchmarks.processes import end, start

ROOT = pathlib.Path(__file__).resolve().parents[1]
CASES = ROOT / "tests" / "data" / "cases"
TIMEOUT = 120  # seconds on an idle machine
NEVER = r"Traceback \(most recent call last\)|RuntimeWarning|DeprecationWarning"
RUNNING = []  # what is to be ended if this script is
PYTHON = """#!/bin/sh
case "$1" in dreamer.py|inference_video.py) script="{root}/$1"; shift; set -- "$script" "$@";; esac
exec "{python}" "$@"
"""


def main(argv=None):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=CASES, help="of the cases (tests/data/cases)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of cases")
    parser.add_argument("--processes", type=int, default=2, help="cases that run at a time (2)")
    args = parser.parse_args(argv)
    found = sorted(path.parent for path in args.folder.glob("*/want"))
    cases = [case for case in found if any(fnmatch.fnmatch(case.name, pattern) for pattern in args.only)]
    if not cases:
        parser.error(f"{args.folder} holds no case of that name")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell that starts it has it ignored
    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        try:
            results = list(pool.map(report, cases))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in RUNNING:
                process.kill()  # which lets the thread that waits for it end the rest
            return 130
    failed, left_out = sum(bool(each) for each in results), results.count(None)
    print(f"{len(cases) - failed - left_out} of {len(cases) - left_out} passed, {left_out} left out")
    return 1 if failed else 0


def report(case):
    """Run a case and print a line if it failed. Return what was wrong, empty if nothing, None if it was left out."""
    begin = time.monotonic()
    wrong = run_case(case)
    if wrong:
        print(f"{case.name} ({time.monotonic() - begin:.0f} s): {wrong}", flush=True)
    return wrong


def run_case(case):
    """Run a case; return what was wrong in one line, empty if nothing, None if a package that it needs is missing."""
    about, *outcomes = map(json.loads, (case / "want").read_text(encoding="utf-8").splitlines())
    if "needs" in about and importlib.util.find_spec(about["needs"]) is None:
        return None
    with tempfile.TemporaryDirectory(prefix="case-") as scratch:
        folder = pathlib.Path(scratch) / case.name
        shutil.copytree(case, folder, ignore=shutil.ignore_patterns("want", "__pycache__"))
        folder.chmod(0o755)
        result = run_command(folder, pathlib.Path(scratch), patience(about.get("timeout", TIMEOUT)))
        wrongs = [differences(outcome, *result, folder) for outcome in outcomes]
    if [] in wrongs:
        return ""
    told = " | ".join("; ".join(wrong) for wrong in wrongs)
    last = " / ".join([line for line in result[2].splitlines() if line.strip()][-2:])
    return f"{about['situation']}: {told} -- {last[-300:]}"


def patience(seconds):
    """Return how long to wait for what takes so many seconds on an idle machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    return seconds * max(1, 2 * load / (os.cpu_count() or 1))


def run_command(folder, scratch, timeout):
    """Run command.txt in a folder. Return exit status, "hang" if it did not end in time, and stdout and stderr."""
    tools = scratch / "bin"
    tools.mkdir()
    (tools / "python").write_text(PYTHON.format(root=ROOT, python=sys.executable))
    (tools / "python").chmod(0o755)
    environ = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "DREAMER": str(ROOT)}
    files = [scratch / "stdout", scratch / "stderr"]
    with files[0].open("wb") as out, files[1].open("wb") as err:  # a pipe would stay open as long as any orphan
        command = (folder / "command.txt").read_text(encoding="utf-8")
        process, mark = start(command, folder, env=environ, stdout=out, stderr=err)
        RUNNING.append(process)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = "hang"
        finally:
            end(process, mark)
            RUNNING.remove(process)
    return status, *(file.read_text(errors="replace") for file in files)


def differences(outcome, status, out, err, folder):
    """Return in words where a result is not the outcome."""
    wrong = []
    statuses = outcome["exit"] if isinstance(outcome.get("exit"), list) else [outcome.get("exit", status)]
    if status not in statuses:
        wrong.append(f"exit {status} where {statuses} was wanted")
    printed = {"stdout": out, "stderr": err, "said": out + err}
    for name, text in printed.items():
        if name in outcome and not re.search(outcome[name], text, re.MULTILINE):
            wrong.append(f"{name} lacks {outcome[name]}")
    for pattern in [NEVER, *([outcome["not"]] if "not" in outcome else [])]:
        if match := re.search(pattern, out + err, re.MULTILINE):
            wrong.append(f"printed {match[0]!r}")
    wrong += [f"no {pattern}" for pattern in outcome.get("files", ()) if not any(folder.glob(pattern))]
    wrong += [f"{pattern} is there" for pattern in outcome.get("absent", ()) if any(folder.glob(pattern))]
    for name, pattern in outcome.get("text", {}).items():
        text = (folder / name).read_text() if (folder / name).is_file() else ""
        if not re.search(pattern, text, re.MULTILINE):
            wrong.append(f"{name} lacks {pattern}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
