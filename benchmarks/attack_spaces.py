"""Attack with environments whose spaces, observations, rewards and flags are anything; see attack.py."""

import collections
import contextlib
import io
import pathlib
import sys
import tempfile
import traceback
import types
import warnings

import gymnasium
import hypothesis
import numpy as np
from gymnasium import spaces
from hypothesis import HealthCheck, strategies
from hypothesis.extra.numpy import array_shapes

import dreamer

MODULE = "hostile_cave"  # where --task finds the environment of the example in hand
WORDS = (
    f"--configs debug --task custom_{MODULE}:Env --steps 14 --size 16 16 --time_limit 6 --prefill 10 --eval_every 0"
    " --eval_episode_num 1 --eval_envs 1 --train_ratio 1 --batch_size 2 --batch_length 3 --video_pred_log false"
    " --log_level warning"
)
BROKEN = ("tracebacks", "several lines", "accepted in silence")
DTYPES = [np.uint8, np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64, bool]
KEYS = ["state", "image", "a/b", "a", "model", "reward", "is_last", "log_x", "", "..", "deter", "action", "x y", "é"]


def attack_spaces(count, seed=0):
    """Train for some steps in `count` environments. Return a Counter of what became of them.

    A run must end well, or in one line with status 2. BROKEN names the counts that must be 0.
    """
    seen = collections.Counter(dict.fromkeys(BROKEN, 0))
    told = set()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=PHASES
    )
    @hypothesis.given(environments())
    def attack(env):
        seen["environments"] += 1
        kind, said = train(env)
        seen[kind] += 1
        if kind in BROKEN and said not in told:
            told.add(said)
            print(f"{kind}: {said}\n  {env}", file=sys.stderr)

    attack()
    return seen


PHASES = [hypothesis.Phase.generate]  # failures are counted, not shrunk


class Hostile:
    """An environment of which every part may be wrong.

    Args:
      odd: {"observation" | "reward" | "terminated" | "truncated" | "result": (step at which it is so, value)}.
    """

    def __init__(self, obs_space, act_space, odd):
        self.observation_space, self.action_space, self.odd = obs_space, act_space, odd

    def __repr__(self):
        return f"{self.observation_space}, {self.action_space}, {self.odd}"[:600]

    def reset(self, *, seed=None, options=None):
        for space in (self.observation_space, self.action_space):
            if isinstance(space, gymnasium.Space):
                space.seed(0)
        self.time = -1
        return self.part("observation", self.look()), {}

    def step(self, action):
        self.time += 1
        obs, ends = self.look(), self.part("terminated", self.time >= 4)
        result = self.part("observation", obs), self.part("reward", 1.0), ends, self.part("truncated", False), {}
        return self.part("result", result)

    def look(self):
        return self.observation_space.sample() if isinstance(self.observation_space, gymnasium.Space) else 0

    def part(self, name, usual):
        when, value = self.odd.get(name, (None, None))
        return value if when is not None and self.time >= when else usual


def train(env):
    """Run dreamer.py with an environment; return what became of it, and the line or the end of the traceback."""
    module = types.ModuleType(MODULE)
    module.Env = type("Env", (Hostile,), {"__init__": lambda self: Hostile.__init__(self, *vars_of(env))})
    sys.modules[MODULE] = module
    errors = io.StringIO()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="attack-") as folder,
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            status = dreamer.main([*WORDS.split(), "--logdir", str(pathlib.Path(folder) / "run")])
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "tracebacks", f"{type(error).__name__}: {str(error)[:200]} ({pathlib.Path(place.filename).name})"
    finally:
        del sys.modules[MODULE]
    said = [line for line in errors.getvalue().splitlines() if line.strip() and "warning:" not in line]
    if status == 0:
        wrong = [name for name, (_, value) in env.odd.items() if not acceptable(name, value, env)]
        return ("accepted in silence", f"{wrong[0]}") if wrong else ("trained", "")
    return ("refused", "") if status == 2 and len(said) == 1 else ("several lines", f"{status}: {said}"[:300])


def vars_of(env):
    return env.observation_space, env.action_space, env.odd


def acceptable(name, value, env):
    """True if it is no harm that a run goes on with a value."""
    if name == "reward":
        return isinstance(value, (int, float, np.number, np.bool_)) or np.size(value) == 1
    if name in ("terminated", "truncated"):
        return isinstance(value, (bool, int, np.bool_, np.integer)) or (np.ndim(value) and np.size(value) == 1)
    if name == "observation":
        space = env.observation_space
        if not isinstance(space, spaces.Box) or not isinstance(value, np.ndarray):
            return space.contains(value) if isinstance(space, spaces.Discrete) else True
        return value.shape == space.shape
    return False


# ---------------------------------------------------------------------------
# What is drawn


@strategies.composite
def boxes(draw):
    """Draw a box: an image, a vector, or of any shape and type."""
    usual = [
        spaces.Box(0, 255, (16, 16, 3), np.uint8),
        spaces.Box(-1, 1, (3,)),
        spaces.Box(0, 255, (3, 16, 16), np.uint8),
        spaces.Box(0, 1, (16, 16, 1)),
        spaces.Box(-np.inf, np.inf, (2,)),
    ]
    if draw(strategies.booleans()):
        return draw(strategies.sampled_from(usual))
    dtype = draw(strategies.sampled_from(DTYPES))
    shape = draw(strategies.one_of(strategies.just(()), array_shapes(max_dims=4, max_side=6)))
    whole = (0, 1) if dtype is bool else (np.iinfo if np.issubdtype(dtype, np.integer) else np.finfo)(dtype)
    bounds = [(0, 1), whole if isinstance(whole, tuple) else (whole.min, whole.max)]
    if dtype is np.float64:  # from all of which Gymnasium cannot draw
        bounds[1] = -8e307, 8e307
    low, high = draw(strategies.sampled_from(bounds))
    return spaces.Box(low, high, shape, dtype)


LEAVES = strategies.one_of(
    boxes(),
    strategies.integers(1, 40).map(spaces.Discrete),
    strategies.integers(-5, 5).map(lambda start: spaces.Discrete(3, start=start)),
    strategies.lists(strategies.integers(1, 5), min_size=1, max_size=3).map(spaces.MultiDiscrete),
    strategies.sampled_from(
        [spaces.MultiBinary(3), spaces.MultiBinary((2, 2)), spaces.MultiDiscrete([[2, 3], [4, 2]])]
    ),
    strategies.sampled_from([spaces.Text(5), spaces.Sequence(spaces.Discrete(3)), spaces.Dict(), spaces.Tuple(())]),
)
SPACES = strategies.recursive(
    LEAVES,
    lambda below: strategies.one_of(
        strategies.dictionaries(strategies.sampled_from(KEYS), below, min_size=1, max_size=3).map(spaces.Dict),
        strategies.lists(below, min_size=1, max_size=3).map(spaces.Tuple),
    ),
    max_leaves=4,
)
VALUES = [
    *(
        None,
        "False",
        "1.0",
        b"x",
        {},
        {"a": 0},
        [],
        [0.5],
        [[0], [0, 1]],
        (),
        object,
        np.nan,
        np.inf,
        1e39,
        -1,
        2.7,
        True,
    ),
    *(True, 10**30, 3 + 1j, np.zeros(0), np.zeros(3), np.zeros((16, 16, 3)), np.full(3, np.nan, np.float32)),
    *(np.array(["a", "b", "c"]), np.array([None] * 3), np.float64(0.5), np.zeros(3, np.float16), np.array([0, 1])),
    *(
        np.full((16, 16, 3), 300),
        np.zeros((3, 16, 16), np.uint8),
        np.zeros(1),
        np.array(False),
        np.array([True, False]),
    ),
]
PARTS = strategies.sampled_from(["observation", "observation", "reward", "terminated", "truncated", "result"])


@strategies.composite
def environments(draw):
    """Draw an environment; half of them give nothing but what their spaces promise."""
    obs_space = draw(SPACES) if draw(strategies.integers(0, 30)) else draw(strategies.sampled_from([None, 3, Hostile]))
    act_space = draw(SPACES)
    odd = {}
    if draw(strategies.booleans()):
        odd[draw(PARTS)] = draw(strategies.integers(-1, 5)), draw(strategies.sampled_from(VALUES))
    return Hostile(obs_space, act_space, odd)
