"""What bash completes once it has read the script of --completion."""

import functools
import subprocess
import sys

import pytest

from tests.factories import ROOT


@functools.cache
def script():
    command = [sys.executable, str(ROOT / "dreamer.py"), "--completion"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def complete(line):
    """Return what bash offers for the last word of a line."""
    words = " ".join(f"'{word}'" for word in line.split(" "))
    words = f"COMP_WORDS=({words})\nCOMP_CWORD={line.count(' ')}"
    code = f'{script()}\n{words}\n_dreamer\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize(
    "line, offered",
    [
        ("python3 dreamer.py --configs dmc_p", ["dmc_proprio"]),
        ("python3 dreamer.py --configs dmc_proprio size1m --log_le", ["--log_level"]),
        ("python3 dreamer.py --configs dmc_proprio size40", ["size400m"]),
        ("./dreamer.py --agent ra", ["random"]),
        ("python3 ../elsewhere/dreamer.py --parallel ", ["true", "false"]),
        ("python3 dreamer.py --logger tensorboard wa", ["wandb"]),
        ("python3 dreamer.py --actor.ent", ["--actor.entropy"]),
        ("python3 dreamer.py --logdir ./log", []),
        ("python3 other.py --conf", []),
    ],
)
def test_a_shell_completes_flags_presets_and_choices(line, offered):
    assert complete(line) == offered
