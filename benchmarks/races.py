"""Race environments against each other: the same steps bare, through `make_env` and in workers, in turns."""

import contextlib
import itertools
import os
import time

import numpy as np

from envs import make_env, make_envs
from specs import act_spec
from training.config import CONFIGS, load_config

# ---------------------------------------------------------------------------
# Steps and their time


def make_config(presets, task, *flags):
    """Return the Config of a task with presets, given as words."""
    names = ["--configs", *presets.split()] if presets else []
    return load_config([*names, "--task", task, *flags], CONFIGS)


def draw_actions(act_space, count, number=1000):
    """Draw `number` random actions {key: (count, width)} for `count` environments, before any clock runs."""
    spec, rng = act_spec(act_space), np.random.default_rng(0)
    return [spec.uniform(rng, count) for _ in range(number)]


def alone(env, actions):
    """Return a function that takes a step of an environment, or a reset if due, and returns the number of steps."""
    actions = itertools.cycle([{key: value[0] for key, value in action.items()} for action in actions])
    obs = env.reset()

    def step():
        nonlocal obs
        obs = env.reset() if obs["is_last"] else env.step(next(actions))
        return int(not obs["is_first"])

    return step


def together(envs, actions):
    """Return a function like that of `alone`, for environments that step together."""
    actions = itertools.cycle(actions)
    envs.reset()
    return lambda: int((~envs.step(next(actions))["is_first"]).sum())


def seconds_per_step(step, seconds):
    """Time `step()`, which returns its number of agent steps, for `seconds` or until there is one step."""
    steps, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or not steps:
        steps += step()
    return elapsed / steps


def pin(cores):
    """Pin this thread, and the processes and threads that it starts from now on, to these cores."""
    if cores:
        os.sched_setaffinity(0, cores)


# ---------------------------------------------------------------------------
# Races


def race_bare(bare, flags, seconds, cores):
    """Race the bare environment, make_env and a worker on the first of `cores`; return `standings`."""
    config = make_config(*flags, "--envs", "1")
    with contextlib.ExitStack() as stack:
        pin(cores[:1])
        env = stack.enter_context(contextlib.closing(make_env(config, "train", 0)))
        envs = stack.enter_context(contextlib.closing(make_envs(config.replace(parallel=True), "train", 1)))
        actions = draw_actions(env.act_space, 1)
        steps = {"bare": bare(env, actions), "make_env": alone(env, actions), "one worker": together(envs, actions)}
        return standings(interleave({name: (cores[:1], step) for name, step in steps.items()}, seconds))


def race_workers(count, flags, seconds, cores):
    """Race one environment in this process, on one core and on two, and `count` workers on two; return `standings`."""
    config = make_config(*flags, "--envs", str(count))
    with contextlib.ExitStack() as stack:
        contestants = {}
        for name, own in (("one core", cores[:1]), ("two cores", cores[:2])):
            pin(own)  # before the environment starts threads to draw with
            env = stack.enter_context(contextlib.closing(make_env(config, "train", 0)))
            contestants[f"make_env, {name}"] = own, alone(env, draw_actions(env.act_space, 1))
        envs = stack.enter_context(contextlib.closing(make_envs(config.replace(parallel=True), "train", count)))
        contestants[f"{count} workers, two cores"] = cores[:2], together(envs, draw_actions(envs.act_space, count))
        return standings(interleave(contestants, seconds, turn=0.5))


def interleave(contestants, seconds, turn=0.1):
    """Return seconds per agent step {name: (rounds)}; contestants take turns, so that noise affects all of them.

    contestants: {name: (cores, function that takes steps and returns how many)}.
    seconds: total time of each, after a warm-up round; turn: time of each in a round.
    """
    times = {name: [] for name in contestants}
    for _ in range(1 + max(1, round(seconds / turn))):
        for name, (cores, step) in contestants.items():
            pin(cores)
            times[name].append(seconds_per_step(step, turn))
    return {name: np.array(found[1:]) for name, found in times.items()}


def standings(times):
    """Return {"us": {name: median µs per step}, "ratio": {name: quartiles of the time over the first's, by round}}."""
    first = next(iter(times.values()))
    ratio = {name: np.percentile(found / first, [25, 50, 75]).tolist() for name, found in times.items()}
    return {"us": {name: 1e6 * np.median(found) for name, found in times.items()}, "ratio": ratio}


def bare_pong(env, actions):
    """Return a step of bare ALE, with the least work that gives observations like those of `env`."""
    import ale_py
    import cv2
    from ale_py import roms

    ale = ale_py.ALEInterface()
    ale.loadROM(roms.get_rom_path("pong"))
    height, width, channels = env.obs_space["image"].shape
    look = ale.getScreenGrayscale if channels == 1 else ale.getScreenRGB
    frames = np.zeros((2, *ale.getScreenDims(), *([3] if channels == 3 else [])), np.uint8)
    minimal, legal = ale.getMinimalActionSet(), ale.getLegalActionSet()
    choices = minimal if env.act_space["action"].n == len(minimal) else legal
    moves = itertools.cycle([choices[action["action"].argmax()] for action in actions])

    def step():
        if ale.game_over():
            ale.reset_game()
        move = next(moves)
        for frame in range(4):
            ale.act(move)
            if frame >= 2:
                look(frames[frame - 2])
        cv2.resize(np.maximum(*frames), (width, height), interpolation=cv2.INTER_AREA)
        return 1

    return step


def bare_walker(env, actions):
    """Return a step of bare dm_control."""
    from dm_control import suite

    walker = suite.load("walker", "walk", task_kwargs={"random": 0})
    moves = itertools.cycle([action["action"][0].astype(np.float64) for action in actions])
    timestep = walker.reset()

    def step():
        nonlocal timestep
        if timestep.last():
            timestep = walker.reset()
            return 0
        move = next(moves)
        for _ in range(2):
            timestep = walker.step(move)
            if timestep.last():
                break
        return 1

    return step
