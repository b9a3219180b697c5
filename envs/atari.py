"""Atari 2600 games in the Arcade Learning Environment (ALE).

Protocol: Machado et al. 2018, "Revisiting the Arcade Learning Environment" (arXiv:1709.06009), with what the
26 games at 100k steps do differently (Kaiser et al. 2020, arXiv:1903.00374) left to the options.
"""

from __future__ import annotations

from typing import Any

import ale_py
import numpy as np
from ale_py import roms
from gymnasium import spaces

from envs.env import Env, Place
from envs.errors import unknown
from envs.wrappers import flags
from specs import tagged

NOOP = ale_py.Action.NOOP
SAMPLES, SILENT = 512, 128  # of a frame's sound, bytes: 30,720 in a second


def make(task: str, config: Any, place: Place) -> Env:
    """Make a game by the name of its ROM; underscores do not count: `pong`, `ms_pacman`, `jamesbond`, `james_bond`.

    Raises: UserError for an unknown game.
    """
    games = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    game = games.get(task.replace("_", ""))
    if game is None:
        raise unknown("atari game", task, games.values())
    return Atari(game, config.atari, config.action_repeat, place.seed)


class Atari:
    """One game. Its `image` is the pixelwise maximum of the last two frames, for games that draw in turns.

    A step is `repeat` frames under one action, fewer where the episode ends; its reward is their sum, as the
    game counts it. Actions stick as ALE has it: at every frame, not at every step.

    Args:
      protocol: has these attributes.
        sticky: probability that a frame runs under the action of the frame before instead of its own.
        noops: most frames without action at the start of a game; their number is drawn from 0 to this.
        actions: "all" 18 of the console or those "needed" by the game.
        gray: ALE's luminance (H, W), else its colors (H, W, 3); mostly 210 by 160.
        lives: what losing one of several lives is: nothing ("unused"), a terminal state in the middle of the
          episode ("discount"), or a terminal end of the episode ("reset"), after which the game goes on.
        limit: frames of a game, not counting no-ops, after which time is out.
        sound: whether there is a `sound`, too: that of the frames of a step, one behind the other, silence where it
          has fewer; at the start of an episode that of one frame, the last.
    """

    def __init__(self, game: str, protocol: Any, repeat: int, seed: int):
        self._repeat = repeat
        self._noops = protocol.noops
        self._lives_count = protocol.lives != "unused"
        self._lives_end = protocol.lives == "reset"
        self._limit = protocol.limit
        self._rng = np.random.default_rng(seed)
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # before it greets
        self._ale = ale = ale_py.ALEInterface()
        ale.setInt("random_seed", seed)
        ale.setFloat("repeat_action_probability", protocol.sticky)
        ale.setBool("sound_obs", protocol.sound)
        ale.loadROM(roms.get_rom_path(game))  # settings count from here
        self._actions = ale.getLegalActionSet() if protocol.actions == "all" else ale.getMinimalActionSet()
        self._screen = ale.getScreenGrayscale if protocol.gray else ale.getScreenRGB
        shape = ale.getScreenDims() if protocol.gray else (*ale.getScreenDims(), 3)
        self._before, self._now, self._image = np.zeros((3, *shape), np.uint8)
        self._goes_on = False  # whether the next episode is the next life of this game
        self.obs_space = {"image": spaces.Box(0, 255, shape, np.uint8)}
        self._sound = np.full(repeat * SAMPLES, SILENT, np.uint8) if protocol.sound else None
        if protocol.sound:
            self.obs_space["sound"] = tagged(spaces.Box(0, 255, (repeat * SAMPLES,), np.uint8), "audio")
        self.act_space = {"action": spaces.Discrete(len(self._actions))}

    def reset(self):
        self._hush()
        if self._goes_on:
            self._ale.act(NOOP)
            self._frames += 1
            self._look()
        else:
            self._ale.reset_game()
            self._frames = 0
            self._look()
            self._look()
            for _ in range(self._rng.integers(self._noops, endpoint=True)):
                self._ale.act(NOOP)
                self._look()
        self._goes_on = False
        self._lives = self._ale.lives()
        self._listen(self._repeat - 1)
        return self._observe(flags(is_first=True))

    def step(self, action):
        act = self._actions[action["action"]]
        reward = 0
        self._hush()
        for left in reversed(range(self._repeat)):
            reward += self._ale.act(act)
            self._listen(self._repeat - 1 - left)
            self._frames += 1
            over = self._ale.game_over()
            died = self._lives_count and self._lost_life()
            out_of_time = self._frames >= self._limit
            if left < 2:
                self._look()
            if over or died or out_of_time:
                break
        if left:  # cut short: the last frame alone, for the one before it was not looked at
            self._look()
            self._look()
        self._goes_on = died and self._lives_end and not (over or out_of_time)
        is_last = over or out_of_time or self._goes_on
        return self._observe(flags(reward, is_last=is_last, is_terminal=over or died))

    def render(self, size=None):
        return self._ale.getScreenRGB()

    def close(self):
        pass

    def _lost_life(self):
        lives = self._ale.lives()
        lost = 0 < lives < self._lives  # without lives some games run on for frames before they are over
        self._lives = lives
        return lost

    def _look(self):
        self._before, self._now = self._now, self._before
        self._screen(self._now)

    def _hush(self):
        if self._sound is not None:
            self._sound.fill(SILENT)

    def _listen(self, frame):
        if self._sound is not None:
            self._sound[frame * SAMPLES : (frame + 1) * SAMPLES] = self._ale.getAudio()

    def _observe(self, signals):
        heard = {} if self._sound is None else {"sound": self._sound}
        return {"image": np.maximum(self._before, self._now, out=self._image), **heard, **signals}
