"""Atari compared with the bare emulator: observations, counters, ends of episodes."""

import sys
from types import SimpleNamespace

import ale_py
import numpy as np
import pytest
from ale_py import roms

import envs.atari
from envs import Place, make_env
from tests.factories import check_conformance, one_line_error, play, same
from tests.factories import env_config as make_config

GAMES = """
    alien amidar assault asterix asteroids atlantis bank_heist battle_zone beam_rider berzerk bowling boxing breakout
    centipede chopper_command crazy_climber defender demon_attack double_dunk enduro fishing_derby freeway frostbite
    gopher gravitar hero ice_hockey jamesbond kangaroo krull kung_fu_master montezuma_revenge ms_pacman
    name_this_game phoenix pitfall pong private_eye qbert riverraid road_runner robotank seaquest skiing solaris
    space_invaders star_gunner surround tennis time_pilot tutankham up_n_down venture video_pinball wizard_of_wor
    yars_revenge zaxxon
"""
NOOP, FIRE, RIGHT = 0, 1, 3  # among all 18 actions


def make_atari_config(game, action_repeat=4, size=(64, 64), **changes):
    """Return a configuration without randomness, unless `changes` add it."""
    protocol = {
        "sticky": 0.0,
        "noops": 0,
        "actions": "all",
        "gray": True,
        "lives": "unused",
        "limit": 108000,
        "sound": False,
    }
    protocol = SimpleNamespace(**{**protocol, **changes})
    return make_config(f"atari_{game}", action_repeat=action_repeat, size=size, atari=protocol)


def make_native(game, seed=0, **changes):
    """Return a game without wrappers: images of the console's size, actions by number."""
    return envs.atari.make(game, make_atari_config(game, **changes), Place("train", 0, seed))


def native_stream(env, actions):
    """Return copies of the observations after a reset and then `actions`, until an episode ends."""
    stream = [{**env.reset()}]
    stream[0]["image"] = stream[0]["image"].copy()
    for action in actions:
        obs = env.step({"action": action})
        stream.append({**obs, "image": obs["image"].copy()})
        if obs["is_last"]:
            break
    return stream


def emulate(game, actions, gray=True):
    """Return the screens of a game, frame by frame from its reset on, and the rewards."""
    ale = ale_py.ALEInterface()
    ale.setInt("random_seed", 0)
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(game))
    ale.reset_game()
    screen = ale.getScreenGrayscale if gray else ale.getScreenRGB
    screens, rewards = [screen()], [0]
    for action in actions:
        rewards.append(ale.act(action))
        screens.append(screen())
    return np.array(screens), np.array(rewards)


# ---------------------------------------------------------------------------
# Names and spaces


def test_names(monkeypatch):
    monkeypatch.setattr(envs.atari, "Atari", lambda game, *_: game)
    assert len(GAMES.split()) == 57
    for game in GAMES.split():
        assert make_native(game) == game
        assert roms.get_rom_path(game).is_file()
    for name, game in {"james_bond": "jamesbond", "river_raid": "riverraid", "mspacman": "ms_pacman"}.items():
        assert make_native(name) == game
    for suite in ("atari", "atari100k"):
        config = make_atari_config("pong")
        config.task = f"{suite}_pnog"
        assert "did you mean 'pong'?" in one_line_error(make_env, config, "train", 0)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    monkeypatch.delitem(sys.modules, "envs.atari")
    assert "pip install -r requirements/atari.txt" in one_line_error(make_env, make_atari_config("pong"), "train", 0)


def test_spaces(capfd):
    env = make_env(make_atari_config("pong", size=(64, 80)), "train", 0)
    assert env.obs_space["image"].shape == (64, 80, 1) and env.act_space["action"].n == 18
    env.reset()
    assert env.render().shape == (210, 160, 3) and env.render().dtype == np.uint8
    env = make_env(make_atari_config("pong", size=(96, 96), gray=False, actions="needed"), "train", 0)
    assert env.obs_space["image"].shape == (96, 96, 3) and env.act_space["action"].n == 6
    assert env.reset()["image"].std(axis=-1).max() > 10  # colors
    assert capfd.readouterr() == ("", "")  # ALE neither greets nor chats


@pytest.mark.parametrize("gray", [True, False])
def test_conformance(gray):
    config = make_atari_config("freeway", sticky=0.25, noops=30, gray=gray, limit=100)
    env = make_env(config, "train", 0)
    stream = check_conformance(env)
    assert len({obs["image"].tobytes() for obs in stream}) > 10
    env.close()
    env.close()


# ---------------------------------------------------------------------------
# Frames


@pytest.mark.parametrize("gray", [True, False])
def test_a_step_is_four_frames(gray):
    actions = np.random.default_rng(0).integers(18, size=150)
    stream = native_stream(make_native("space_invaders", gray=gray), actions)
    screens, rewards = emulate("space_invaders", np.repeat(actions, 4), gray)
    assert np.array_equal(stream[0]["image"], screens[0])
    flickers = 0
    for step, obs in enumerate(stream[1:], start=1):
        assert np.array_equal(obs["image"], np.maximum(screens[4 * step - 1], screens[4 * step]))
        assert obs["reward"] == rewards[4 * step - 3 : 4 * step + 1].sum()
        flickers += not np.array_equal(obs["image"], screens[4 * step])
    assert flickers > 50
    assert max(obs["reward"] for obs in stream) > 1  # not clipped


def test_maximum_over_single_frames():
    actions = [FIRE] * 5 + [RIGHT] * 20
    stream = native_stream(make_native("breakout", action_repeat=1), actions)
    screens, _ = emulate("breakout", actions)
    for frame in range(1, 26):
        assert np.array_equal(stream[frame]["image"], np.maximum(screens[frame - 1], screens[frame]))
    assert (screens[1:] != screens[:-1]).any()


def test_noops():
    screens, _ = emulate("freeway", [NOOP] * 31)  # the cars never stop
    seen = {np.maximum(screens[max(0, frame - 1)], screens[frame]).tobytes(): frame for frame in range(32)}
    assert len(seen) == 32

    def noops(seed, most):
        env = make_native("freeway", seed, noops=most)
        return [seen[env.reset()["image"].tobytes()] for _ in range(8)]

    first = noops(0, 30)
    assert len(set(first)) > 3
    assert noops(0, 30) == first != noops(1, 30)
    assert set(noops(0, 1)) == {0, 1}


@pytest.mark.parametrize("limit, steps", [(9, 3), (12, 3), (13, 4)])
def test_limit_is_a_time_out(limit, steps):
    env = make_native("freeway", limit=limit)
    screens, _ = emulate("freeway", [FIRE] * limit)
    for _ in range(2):  # each game has its own count
        stream = native_stream(env, [FIRE] * 10)
        assert len(stream) == 1 + steps
        assert [bool(obs["is_last"]) for obs in stream] == [False] * steps + [True]
        assert not any(obs["is_terminal"] for obs in stream)
        last = screens[limit] if limit % 4 else np.maximum(screens[limit - 1], screens[limit])
        assert np.array_equal(stream[-1]["image"], last)


# ---------------------------------------------------------------------------
# Chance


def test_sticky_actions():
    actions = np.random.default_rng(0).integers(18, size=60)

    def stream(seed=0, actions=actions, **changes):
        return native_stream(make_native("boxing", seed, **changes), actions)

    free = stream(sticky=0.0)
    assert same(free, stream(seed=1, sticky=0.0))
    assert not same(free, stream(sticky=0.25))
    assert not same(free, stream(sticky=0.0, actions=[NOOP] * 60))
    assert same(stream(sticky=1.0), stream(sticky=0.0, actions=[NOOP] * 60))  # nothing follows the first no-op


def test_seeds():
    def stream(mode, index, seed=0):
        config = make_atari_config("boxing", sticky=0.25, limit=160)
        config.seed = seed
        return play(make_env(config, mode, index), 81)

    first = stream("train", 0)
    assert same(first, stream("train", 0))
    assert not same(first, stream("train", 1))
    assert not same(first, stream("eval", 0))
    assert not same(first, stream("train", 0, seed=1))


def test_every_game_has_chances_of_its_own():
    env = make_native("boxing", sticky=0.25)
    actions = np.random.default_rng(0).integers(18, size=60)
    assert not same(native_stream(env, actions), native_stream(env, actions))


# ---------------------------------------------------------------------------
# Lives: serving only, in Breakout, loses all five, one by one


def serve(lives, episodes=1):
    env = make_native("breakout", lives=lives)
    streams = [native_stream(env, [FIRE] * 1000) for _ in range(episodes)]
    return [
        (len(stream) - 1, sum(obs["is_last"] for obs in stream), sum(obs["is_terminal"] for obs in stream))
        for stream in streams
    ], [stream[0]["image"] for stream in streams]


def test_lives():
    [(whole, *ends)], _ = serve("unused")
    assert ends == [1, 1]
    [(discounted, *ends)], _ = serve("discount")
    assert ends == [1, 5]
    games, starts = serve("reset", episodes=7)
    assert [ends for _, *ends in games] == [[1, 1]] * 7
    lengths = [steps for steps, *_ in games]
    assert whole <= discounted <= whole + 4  # a step that loses a life is cut short
    assert abs(sum(lengths[:5]) - whole) <= 5 and lengths[5:] == lengths[:2]
    assert np.array_equal(starts[5], starts[0])  # a new game
    assert not any(np.array_equal(start, starts[0]) for start in starts[1:5])  # the same goes on, with fewer lives


def test_a_life_without_end_of_game_does_not_outlive_a_reset():
    env = make_native("breakout", lives="reset")
    start = env.reset()["image"].copy()
    for _ in range(10):
        env.step({"action": FIRE})
    assert np.array_equal(env.reset()["image"], start)
