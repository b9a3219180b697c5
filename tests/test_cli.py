"""The command line as a newcomer meets it: without packages, installed by pip, cleaned up."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from training import installed

ROOT = pathlib.Path(__file__).parents[1]


def run(*words, cwd=ROOT, **env):
    """Run a command; return the completed process."""
    words = list(map(str, words))
    return subprocess.run(words, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=60)


# Packages


@pytest.mark.parametrize("program", ["dreamer.py", "inference_video.py"])
def test_without_packages_one_line_says_what_to_run(program, tmp_path):
    done = run(sys.executable, "-S", ROOT / program, "--help", cwd=tmp_path)  # -S: without site-packages
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{program}: torch, ") and done.stderr.count("\n") == 1
    assert f".venv/bin/python {program}" in done.stderr
    assert "make .venv/core" in done.stderr or "source .venv/bin/activate" in done.stderr


def test_packages_that_are_there_are_named_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "ROOT", str(tmp_path))
    assert installed.problem("dreamer.py") == ""
    monkeypatch.setattr(installed, "is_there", lambda name: name != "tqdm")
    assert installed.problem("dreamer.py").startswith(
        f"tqdm is not installed for {sys.executable}: run make .venv/core"
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


@pytest.mark.parametrize("words", [["."], ["-e", "."]])
def test_pip_is_told_in_one_line_that_nothing_is_to_be_installed(tmp_path, words):
    pytest.importorskip("pip")
    quiet = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    quiet += ["--target", tmp_path]
    done = run(sys.executable, "-m", "pip", "install", *quiet, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    (said,) = (line for line in done.stderr.splitlines() if "make .venv/core" in line)
    assert "run from its folder" in said and f"PYTHONPATH={ROOT}" in said


# The Makefile and the image


def test_cleaning_up_leaves_runs_alone():
    done = run("make", "-n", "clean")
    assert done.returncode == 0 and "rm -rf .venv" in done.stdout and "logdir" not in done.stdout


@pytest.mark.parametrize("name", [".venv", "logdir", ".git"])
def test_an_image_is_built_without_what_weighs_gigabytes(name):
    assert name in (ROOT / ".dockerignore").read_text().splitlines()
