"""A task that does not exist is told of in a moment, in the words of its suite."""

import importlib
import importlib.util
import subprocess
import sys

import gymnasium
import pytest

from envs import names
from envs.names import PACKAGES, check_task
from envs.tasks import SUITES
from tests.factories import env_config, one_line_error
from training.config import CONFIGS, load_config

MISSPELT = ("atari_pog", "bsuite_cathc/0", "crafter_rewards", "dmc_walker_wlk", "memorymaze_9x8", "dummy_vectr")
MISSPELT += ("minigrid_DoorKey-5x5-v1", "popgym_RepeatPrevEasy", "procgen_coinru", "gym_CartPol-v1", "gym_ALE/Pog-v5")
MISSPELT += ("minecraft_diamnd", "dmlab_explore_object_reward_few")


def needs(suite):
    """Skip the test where the package of a suite is not installed."""
    if suite in PACKAGES and importlib.util.find_spec(PACKAGES[suite]) is None:
        pytest.skip(f"{PACKAGES[suite]} is not installed")


def config_of(*flags):
    return load_config(["--configs", "debug", *flags], CONFIGS)


@pytest.mark.parametrize("task", MISSPELT)
def test_a_misspelt_task_is_told_of_as_its_suite_would(task):
    suite, _, name = task.partition("_")
    needs("atari" if "ALE" in name else suite)
    said = one_line_error(check_task, config_of("--task", task))
    module, make, _ = SUITES[suite]
    made = one_line_error(getattr(importlib.import_module(module), make), name, env_config(task), place())
    assert said == made and "did you mean" in said


def place():
    from envs.env import Place

    return Place("train", 0, 0)


def test_the_names_that_are_read_are_those_of_the_suites():
    needs("dmc")
    needs("minigrid")
    suite = importlib.import_module("dm_control.suite")
    assert set(names.dmc_tasks()) - names.CUP == {f"{domain}_{name}" for domain, name in suite.ALL_TASKS}
    importlib.import_module("minigrid")
    ids = {name for name in gymnasium.registry if name.startswith(("MiniGrid-", "BabyAI-"))}
    assert set(names.minigrid_tasks()) == {name for name in ids if "WFC" not in name}


@pytest.mark.parametrize("task", ["dmc_cup_catch", "atari_ms_pacman", "atari100k_mspacman", "minigrid_Empty-5x5-v0"])
def test_other_spellings_are_let_through(task):
    needs(task.partition("_")[0])
    check_task(config_of("--task", task))


def test_what_is_made_elsewhere_or_known_later_is_let_through():
    check_task(config_of("--task", "crafter_rewards", "--remote.actors", "2"))
    check_task(config_of("--task", "gym_mine:Cave-v0"))
    check_task(load_config(["--script", "eval_only"], CONFIGS))  # of a checkpoint that will name the task


@pytest.mark.parametrize("suite, package", PACKAGES.items())
def test_a_suite_that_is_not_installed_is_told_of(suite, package, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = one_line_error(check_task, config_of("--task", f"{suite}_any"))
    assert said == f"task '{suite}_any' cannot be made (No module named '{package}'): pip install {SUITES[suite][2]}"


@pytest.mark.parametrize(
    "task", ["CartPole-v1", "gym_CartPol-v1", "dmc_walker_wlk", "crafter_rewrd", "minigrid_DoorKy"]
)
def test_a_misspelt_task_does_not_wait_for_torch(task):
    code = f"import sys, dreamer; print(dreamer.main(['--task', {task!r}]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout == "2 False\n" and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    "program, words",
    [
        ("export.py", ["--help"]),
        ("export.py", ["--checkpoint", "/no/such"]),
        ("inference_video.py", ["--help"]),
        ("inference_video.py", ["--use-random-agent", "--tsk", "dummy_vector"]),
        ("doctor.py", ["--help"]),
        ("doctor.py", ["--devise", "cpu"]),
    ],
)
def test_help_and_a_misspelt_flag_do_not_wait_for_torch(program, words):
    code = f"import sys, runpy; sys.argv = {[program, *words]!r}\n"
    code += f"try: runpy.run_path({program!r}, run_name='__main__')\n"
    code += "except SystemExit as end: print('ended', end.code, 'torch' in sys.modules, 'cv2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, timeout=60)
    assert done.stdout.endswith(f"ended {0 if words == ['--help'] else 2} False False\n"), done.stdout + done.stderr
