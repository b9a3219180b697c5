"""What enters is checked: every observation, reward and flag, at every step, against what was promised of it.

From each space a test is made once that tells at a glance what is fine, in well under a microsecond for a vector. What
fails it is looked at again by `problem`, which finds the words for it, or that nothing is wrong: an environment may
give lists for arrays, and whole numbers for others.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.spaces.text import alphanumeric

import modalities
from envs.env import Env
from envs.wrappers import Wrapper
from specs import is_optional
from tools import UserError

LARGEST = float(np.finfo(np.float32).max)  # what is larger is infinite to networks
SMALL = 64  # numbers up to which a Python list is faster than NumPy
SLACK = 1e-3  # of the range of images of floats, for what rounding puts beyond it
PLAIN = spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary
UINT8 = np.dtype(np.uint8)
INTEGERS = {int, *(np.dtype(code).type for code in "bBhHiIlLqQ")}
FLOATS = {float, np.float64, np.float32}
BOOLS = {bool, np.bool_}
ALPHANUMERIC = frozenset(alphanumeric)  # the characters of a Text space of which nothing was said


class Checked(Wrapper):
    """Passes on what an environment gives if it is in its spaces. Raises UserError, one line, for anything else.

    name: of the environment, for messages.
    """

    def __init__(self, env: Env, config: Any, name: str):
        super().__init__(env)
        self.name = name
        self._images = {key: modalities.kind_of(space, config) == "image" for key, space in env.obs_space.items()}
        self._tests = [(key, test_of(space, self._images[key])) for key, space in env.obs_space.items()]
        self._tests = [
            (key, or_missing(test) if is_optional(env.obs_space[key]) else test) for key, test in self._tests
        ]
        self._steps = 0

    def reset(self):
        self._steps = 0
        return self._checked(self.env.reset())

    def step(self, action):
        self._steps += 1
        return self._checked(self.env.step(action))

    def _checked(self, obs):
        for key, fine in self._tests:
            if not fine(obs[key]):
                self._look_again(key, obs[key])
        if not -LARGEST <= obs["reward"] <= LARGEST:
            raise refusal(self.name, self._steps, f"the reward is not finite: {obs['reward']}")
        return obs

    def _look_again(self, key, value):
        found = problem(self.env.obs_space[key], value, self._images[key])
        if found:
            raise refusal(self.name, self._steps, f"observation '{key}' {found}")


def refusal(name: str, step: int, what: str) -> UserError:
    """Return the error that tells what an environment did wrong, and at which step of its episode."""
    return UserError(f"{name} at step {step} of its episode: {what}")


# ---------------------------------------------------------------------------
# Observations


def test_of(space: spaces.Space, image: bool) -> Callable[[Any], bool]:
    """Return a fast test of an observation in a plain space: True only for what is fine. image: it is of that kind."""
    if isinstance(space, spaces.Discrete):
        start, stop = int(space.start), int(space.start + space.n)
        return lambda value: type(value) in INTEGERS and start <= value < stop
    shape = space.shape
    if isinstance(space, spaces.MultiDiscrete):
        low, high = space.start, space.start + space.nvec
        return lambda value: is_array(value, shape, "iu") and bool((value >= low).all()) and bool((value < high).all())
    if isinstance(space, spaces.MultiBinary):
        return lambda value: is_array(value, shape, "biu") and bool(((value == 0) | (value == 1)).all())
    if isinstance(space, spaces.Text):
        return text_test(space)
    if not isinstance(space, spaces.Box):  # which the kind refuses
        return lambda value: True
    if space.dtype == UINT8 and (space.low == 0).all() and (space.high == 255).all():
        return lambda value: type(value) is np.ndarray and value.dtype is UINT8 and value.shape == shape
    if image or space.dtype == UINT8:
        kinds, (low, high) = "f" if space.dtype.kind == "f" else "biu", limits(space, image)
        return lambda value: is_array(value, shape, kinds) and low <= value.min() and value.max() <= high
    if space.dtype.kind != "f":
        return lambda value: is_array(value, shape, "biu")
    return numbers_test(shape)


def text_test(space: spaces.Text) -> Callable[[Any], bool]:
    """Return a test of texts: as long as the space says, and of its characters if it names any.

    Gymnasium's own, letters and digits, and at least one of them, are what a space has of which nothing was said.
    """
    least, letters = least_letters(space), space.character_set
    if letters == ALPHANUMERIC:
        return lambda value: isinstance(value, str) and len(value) >= least
    return lambda value: isinstance(value, str) and len(value) >= least and letters.issuperset(value)


def least_letters(space: spaces.Text) -> int:
    """Return the length that a text must have: one stands for what nobody has said."""
    return space.min_length if space.min_length > 1 else 0


def or_missing(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a test that also takes None, for what may be missing."""
    return lambda value: value is None or test(value)


def is_array(value: Any, shape: tuple[int, ...], kinds: str) -> bool:
    """True for an array of a shape whose dtype is of one of the kinds."""
    return type(value) is np.ndarray and value.shape == shape and value.dtype.kind in kinds


def numbers_test(shape: tuple[int, ...]) -> Callable[[Any], bool]:
    """Return a test of numbers of a shape: they must be finite in single precision."""

    def scalar(value):
        return (type(value) in FLOATS or is_array(value, (), "f")) and -LARGEST <= value <= LARGEST

    def small(value):
        if type(value) is not np.ndarray or value.shape != shape:
            return False
        kind = value.dtype.kind
        # The norm is no smaller than its largest part, infinite if one is, and not a number only if one is not.
        return (kind == "f" and math.hypot(*value.ravel().tolist()) <= LARGEST) or kind in "iu"

    def flat(value):
        if type(value) is not np.ndarray or value.shape != shape:
            return False
        kind = value.dtype.kind
        return (kind == "f" and math.hypot(*value.tolist()) <= LARGEST) or kind in "iu"

    def large(value):
        return is_array(value, shape, "f") and value.min() >= -LARGEST and value.max() <= LARGEST

    if not shape:
        return scalar
    if math.prod(shape) > SMALL:
        return large
    return flat if len(shape) == 1 else small


def limits(space: spaces.Box, image: bool) -> tuple[float, float]:
    """Return the least and largest number that may stand in an image, or in a vector of uint8."""
    if not image:
        return 0, 255
    low, high = float(space.low.min()), float(space.high.max())
    slack = SLACK * (high - low) if space.dtype.kind == "f" else 0
    return low - slack, high + slack


def problem(space: spaces.Space, value: Any, image: bool = False) -> str | None:
    """Say what is wrong with an observation in a plain space, to follow its name; None if nothing is."""
    shape = space.shape or ()
    if isinstance(space, spaces.Text):
        return text_problem(space, value)
    if not isinstance(space, PLAIN):
        return None
    if value is None or isinstance(value, (Mapping, str, bytes)):
        return f"is {article(value)} where its space has {expected(space)}"
    try:
        array = np.asarray(value)
    except ValueError:
        return f"is ragged where its space has {expected(space)}"
    if array.dtype.kind not in "biuf":
        what = "text" if array.dtype.kind in "US" else f"{array.dtype} {array.shape}"
        return f"is {what} where its space has {expected(space)}"
    if array.shape != shape:
        return f"has shape {array.shape} where its space has {shape}"
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        stop = np.asarray(space.start) + (space.n if isinstance(space, spaces.Discrete) else space.nvec)
        wrong = (array < space.start) | (array >= stop) | (array % 1 != 0)
        return f"is {first(array, wrong)} where its space has {expected(space)}" if wrong.any() else None
    return numbers_problem(space, array, image)


def text_problem(space: spaces.Text, value: Any) -> str | None:
    """Say what is wrong with what should be a text."""
    if not isinstance(value, str):
        cure = ": decode them, as by .decode()" if isinstance(value, bytes) else ""
        return f"is {article(value)} where its space has text{cure}"
    if len(value) < least_letters(space):
        return f"is {value!a}, of {len(value)} characters, where its space has {space.min_length} or more"
    strange = next((letter for letter in value if letter not in space.character_set), None)
    if strange is not None and space.character_set != ALPHANUMERIC:
        return f"has {strange!a}, which is none of the characters of its space"
    return None


def numbers_problem(space: spaces.Box | spaces.MultiBinary, array: np.ndarray, image: bool) -> str | None:
    """Say what is wrong with an array of numbers or bits of the right shape."""
    if array.dtype.kind == "f" and not (np.abs(array) <= LARGEST).all():  # false for what is not a number
        wrong = ~(np.abs(array) <= LARGEST)
        return f"is not finite: {first(array, wrong)} ({wrong.sum()} of {array.size} numbers)"
    if isinstance(space, spaces.MultiBinary):
        wrong = (array != 0) & (array != 1)
        return f"is {first(array, wrong)} where its space has 0 and 1" if wrong.any() else None
    pixels = image and space.dtype == UINT8 and space.high.max() > 1
    if pixels and array.dtype.kind in "bf":
        own = "bool" if array.dtype.kind == "b" else "np.float32"
        return f"is {array.dtype} where its space has {expected(space)}: give that, or declare Box(0, 1, shape, {own})"
    if image or space.dtype == UINT8:
        low, high = limits(space, image)
        wrong = (array < low) | (array > high)
        if wrong.any():
            least, most = (space.low.min(), space.high.max()) if image else (0, 255)
            return f"is {first(array, wrong)} where its space has {least} to {most}"
    if space.dtype.kind in "biu" and (array % 1 != 0).any():
        return f"is {first(array, array % 1 != 0)} where its space has {expected(space)}"
    return None


def first(array: np.ndarray, wrong: np.ndarray) -> Any:
    """Return the first number that is wrong."""
    return array[wrong][0]


def expected(space: spaces.Space) -> str:
    """Describe what a plain space has."""
    if isinstance(space, spaces.Discrete):
        return f"a whole number from {space.start} to {space.start + space.n - 1}"
    if isinstance(space, spaces.MultiDiscrete):
        return f"whole numbers from {space.start.tolist()} to {(space.start + space.nvec - 1).tolist()}"
    return f"{space.dtype} {space.shape}"


def article(value: Any) -> str:
    """Return the kind of a value that is no number, such as "a dict"."""
    if value is None or isinstance(value, (str, bytes)):
        return "None" if value is None else "bytes" if isinstance(value, bytes) else "text"
    return f"an array {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


# ---------------------------------------------------------------------------
# What comes beside an observation


def reward_of(value: Any) -> float:
    """Return a reward as a number; raise ValueError that says what is wrong with it."""
    if type(value) not in FLOATS:
        given = plain(value, 1)
        if not isinstance(given, numbers.Real):
            several = " (of several environments? a vectorized one cannot be taken)" if np.size(value) > 1 else ""
            raise ValueError(f"the reward is {article(value)}, expected one number{several}")
        value = float(given)
    if not -LARGEST <= value <= LARGEST:
        raise ValueError(f"the reward is not finite: {value}")
    return value


def flag_of(name: str, value: Any) -> bool:
    """Return a flag as a bool; raise ValueError that says what is wrong with it. name: terminated or truncated."""
    if type(value) in BOOLS:
        return bool(value)
    given = plain(value, 0)
    if not (isinstance(given, numbers.Real) and given in (0, 1)):
        found = given if isinstance(given, numbers.Real) else article(value)
        raise ValueError(f"{name} is {found}, expected True or False")
    return bool(given)


def plain(value: Any, axes: int) -> Any:
    """Return the number that an array or a tensor holds, if it is of one with at most so many axes; else as it is."""
    shape = getattr(value, "shape", None)
    single = isinstance(shape, tuple) and len(shape) <= axes and math.prod(shape) == 1
    return value.item() if single and hasattr(value, "item") else value


def info_of(value: Any) -> Mapping:
    """Return an info; raise ValueError unless it is a dict."""
    if not isinstance(value, Mapping):
        raise ValueError(f"info is {article(value)}, expected a dict")
    return value


Spaces = tuple[Mapping[str, spaces.Space], Mapping[str, spaces.Space]]


def check_same(first: Spaces, other: Spaces, whose: str) -> None:
    """Raise UserError that names the first space in which an environment differs from the first one.

    Args:
      first, other: the spaces of observations and of actions; whose: the other's, for the message.
    """
    for kind, one, two in zip(("observation", "action"), first, other, strict=True):
        for key in [*one, *(key for key in two if key not in one)]:
            if one.get(key) != two.get(key):
                found = f"{kind} '{key}' is {two.get(key)} there and {one.get(key)} in the first"
                raise UserError(f"{whose} has other spaces: {found}")
