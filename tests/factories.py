"""Shared fixtures of tests: small agents, batches and observations; environments and steps in them."""

import functools
import os
import pathlib
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch.utils._python_dispatch import TorchDispatchMode

from agents.dreamer import Dreamer
from envs import make_env
from modalities import kind_of, obs_spec
from modalities.audio.space import Waveform
from modalities.text.space import Tokens
from specs import act_spec
from tools import UserError
from training.config import load_config

torch.set_num_threads(1)  # these networks are tiny: a second thread only waits for the first

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs.yaml"

# ---------------------------------------------------------------------------
# Agents

IMAGE = Box(0, 255, (16, 32, 3), np.uint8)
WALKER = {"orientations": Box(-1, 1, (14,)), "height": Box(-9, 9, (1,)), "velocity": Box(-9, 9, (9,))}
SPACES = {
    "proprio": (WALKER, {"action": Box(-1, 1, (6,))}),
    "pixels": ({"image": IMAGE}, {"action": Discrete(5)}),
    "mixed": (
        {"phase": Discrete(3), "image": IMAGE, "state": Box(-1, 1, (2,)), "cards": MultiDiscrete([2, 4])},
        {"move": Box(-1, 1, (2,)), "mode": Discrete(3), "buttons": MultiDiscrete([2, 3])},
    ),
}
TOLD = (  # what is read and heard, some of it not always
    {
        "said": Tokens(6, 9),
        "mic": Waveform(-1, 1, (64, 1)),
        "mic/present": Discrete(2),
        "noise": Waveform(0, 255, (16, 2), np.uint8),
    },
    {"action": Discrete(5)},
)
KINDS = {**SPACES, "told": TOLD}


def make_config(*flags):
    """Return tiny sizes, one update of warm-up and no free nats, so that every parameter has a gradient."""
    return load_config(["--configs", "debug", "--opt.warmup", "1", "--free_nats", "0", *flags], CONFIGS)


def make_dreamer(obs_space, act_space, config, **kwargs):
    """Return a Dreamer for {key: Gymnasium space} of observations and of actions."""
    return Dreamer(obs_spec(obs_space), act_spec(act_space), config, **kwargs)


def make_agent(kind, *flags, seed=0):
    torch.manual_seed(seed)
    return make_dreamer(*KINDS[kind], make_config(*flags))


def shake(agent, scale=0.1):
    """Move the parameters away from their initial values, where critic and reward do not depend on the state."""
    with torch.no_grad():
        for param in getattr(agent, "nets", agent).parameters():
            param.add_(scale * torch.randn_like(param))
    return agent


def parameters(agent):
    return {name: param.detach().clone() for name, param in agent.nets.named_parameters()}


def initial(agent, count=3):
    """Return the state before a batch of `count` sequences."""
    return agent.world.rssm.initial(count, "cpu", agent.dtype).map(torch.Tensor.detach)


def make_batch(kind, size=(3, 5), seed=0):
    """Return a random batch as from the replay, with episodes that end and begin."""
    rng = np.random.default_rng(seed)

    def draw(space):
        if isinstance(space, Box) and space.dtype == np.uint8:
            return rng.integers(0, 256, (*size, *space.shape), np.uint8)
        if isinstance(space, Box):
            return rng.uniform(-1, 1, (*size, *space.shape)).astype(np.float32)
        count = space.n if isinstance(space, Discrete) else space.nvec
        return rng.integers(count, size=(*size, *space.shape)).astype(np.int32)

    def one_hot(space, value):
        if isinstance(space, Box):
            return value
        counts = [space.n] if isinstance(space, Discrete) else space.nvec
        parts = zip(value.reshape(*size, -1).transpose(2, 0, 1), counts, strict=True)
        return np.concatenate([np.eye(n, dtype=np.float32)[part] for part, n in parts], -1)

    obs_space, act_space = KINDS[kind]
    batch = {key: draw(space) for key, space in obs_space.items()}
    batch |= {key: one_hot(space, draw(space)) for key, space in act_space.items()}
    batch["reward"] = rng.normal(size=size).astype(np.float32)
    batch["is_last"] = rng.random(size) < 0.2
    batch["is_terminal"] = batch["is_last"] & (rng.random(size) < 0.5)
    batch["is_first"] = np.concatenate([rng.random((size[0], 1)) < 0.5, batch["is_last"][:, :-1]], 1)
    return {key: torch.from_numpy(value) for key, value in batch.items()}


def world_losses(world, batch, noise=None):
    """Return losses and states of a world model on a batch with `action`, by given or drawn noise (B, T, S)."""
    batch = world.prepare(batch)
    start = world.rssm.initial(len(batch["reward"]), "cpu", world.dtype)
    states, post = world.rssm.observe(world.encode(batch), batch["action"], batch["is_first"], start, noise)
    return world.losses(states, post, batch)[0], states


def make_obs(kind, count=3, is_first=False, seed=0):
    """Return observations of `count` environments, as arrays."""
    batch = make_batch(kind, (count, 1), seed)
    obs = {key: batch[key][:, 0].numpy() for key in KINDS[kind][0]}
    return {**obs, "is_first": np.full(count, is_first)}


def act(agent, obs, carry=None, mode="sample", seed=None):
    """Return actions and the next carry; the seed determines the random draws."""
    if seed is not None:
        agent.generators["act"].manual_seed(seed)
    actions, carry, _ = agent.act(obs, agent.initial(len(obs["is_first"])) if carry is None else carry, mode)
    return actions, carry


class Watch(TorchDispatchMode):
    """Record the operations that make the host wait for a number."""

    SYNCS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal")

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.found += [name] if by_mask or name in self.SYNCS else []
        self.count += 1
        return function(*args, **(kwargs or {}))


# ---------------------------------------------------------------------------
# The family

VERSIONS = {
    "dreamerv3": [],
    "dreamerv3_2023": ["dreamerv3_2023"],
    "dreamerv2": ["dreamerv2"],
    "dreamerv2_atari": ["dreamerv2", "dreamerv2_atari"],
    "dreamerv1": ["dreamerv1"],
    "planet": ["planet"],
}
LARGE = Box(0, 255, (64, 64, 3), np.uint8)  # the one size that every version's image stack takes
FAMILY = {"proprio": SPACES["proprio"], "pixels": ({"image": LARGE}, SPACES["pixels"][1])}
every_version = pytest.mark.parametrize("version", VERSIONS)
every_kind = pytest.mark.parametrize("kind", FAMILY)


@functools.cache
def base_config(version):
    """Return tiny sizes, no warm-up and no free nats, so that every parameter has a gradient."""
    return load_config(["--configs", *VERSIONS[version], "debug", "--opt.warmup", "0", "--free_nats", "0"], CONFIGS)


def family_config(version, changes=()):
    """Return the configuration of a version with some changes {dotted key: value}."""
    return base_config(version).replace(**dict(changes))


def family_agent(version, kind, changes=(), seed=0):
    """Return an agent whose parameters were moved away from their initial values."""
    torch.manual_seed(seed)
    return shake(make_dreamer(*{**KINDS, **FAMILY}[kind], family_config(version, changes)))


def make_sequences(kind, seed=0):
    """Return a batch of three sequences of five steps."""
    batch = make_batch(kind, seed=seed)
    if kind == "pixels":
        generator = torch.Generator().manual_seed(seed)
        batch["image"] = torch.randint(256, (3, 5, *LARGE.shape), generator=generator, dtype=torch.uint8)
    return batch


def observations(kind, seed=0, **kind_of_step):
    obs = make_obs(kind, seed=seed, **kind_of_step)
    return obs | ({"image": make_sequences(kind, seed)["image"][:, 0].numpy()} if kind == "pixels" else {})


# ---------------------------------------------------------------------------
# Environments


class Section(SimpleNamespace):
    """An open section of a configuration."""

    def to_dict(self):
        return dict(vars(self))


def env_config(task, cnn_keys=".*", mlp_keys=".*", **changes):
    """Return the configuration that `make_env` reads."""
    defaults = {
        "seed": 0,
        "size": (64, 64),
        "action_repeat": 1,
        "time_limit": 0,
        "frame_stack": 1,
        "image_layout": "auto",
        "wrappers": (),
        "log_info": (),
        "camera": -1,
        "parallel": False,
        "env_timeout": 600,
        "text": SimpleNamespace(length=64, tokenizer="", embeddings=""),
        "modalities": Section(),
    }
    encoder = SimpleNamespace(cnn_keys=cnn_keys, mlp_keys=mlp_keys, text_keys=".*", audio_keys=".*")
    env = Section(**changes.get("env", {}))
    return SimpleNamespace(**{"task": task, "encoder": encoder, **defaults, **changes, "env": env})


class Toy:
    """An environment of twelve steps that observes `look(step)`, by default a sample of its space."""

    action_space = Discrete(2)

    def __init__(self, space, look=None, act=None, **attributes):
        self.observation_space = space
        self.look = look or (lambda step: space.sample())
        self.act = act or (lambda step: (1.0, step >= 12, False, {}))
        vars(self).update(attributes)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.look(0), {}

    def step(self, action):
        self.steps, self.action = self.steps + 1, action
        return self.look(self.steps), *self.act(self.steps)


TOYS = []


def newest_toy():
    """Return the toy that `make_toy` was called with: its task names this function."""
    return TOYS[-1]


def make_toy(toy, **changes):
    """Return what `make_env` makes of a toy."""
    TOYS[:] = [toy]
    return make_env(env_config("custom_tests.factories:newest_toy", **changes), "train", 0)


def draw_action(act_space, rng):
    """Return a random action in the format of agents: float32, one-hot if discrete."""

    def draw(space):
        if isinstance(space, spaces.Box):
            return rng.uniform(-1, 1, space.shape).astype(np.float32)
        nvec = [space.n] if isinstance(space, spaces.Discrete) else space.nvec
        return np.concatenate([np.eye(n, dtype=np.float32)[rng.integers(n)] for n in nvec])

    return {key: draw(space) for key, space in act_space.items()}


def play(env, steps, seed=0):
    """Return the observations of `steps` random steps after a reset, over as many episodes as needed."""
    rng = np.random.default_rng(seed)
    stream = [env.reset()]
    for _ in range(steps):
        ended = stream[-1]["is_last"]
        stream.append(env.reset() if ended else env.step(draw_action(env.act_space, rng)))
    return stream


def same(one, other):
    """True if two streams of observations are equal."""
    pairs = list(zip(one, other, strict=True))
    return all(a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a) for a, b in pairs)


def one_line_error(function, *args):
    """Return the message of the UserError that a call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        function(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def check_conformance(env, steps=60):
    stream = play(env, steps)
    assert sum(obs["is_last"] for obs in stream) >= 1, "too short a test: no episode ended"
    names = env.obs_space.keys() | {"reward", "is_first", "is_last", "is_terminal"}
    fresh = True
    for obs in stream:
        assert {key for key in obs if not key.startswith("log_")} == names
        for key, space in env.obs_space.items():
            check_value(space, obs[key])
        assert obs["reward"].dtype == np.float32 and obs["reward"].shape == ()
        assert all(np.asarray(obs[key]).dtype == bool for key in ("is_first", "is_last", "is_terminal"))
        assert obs["is_first"] == fresh
        assert not (obs["is_terminal"] and not obs["is_last"])
        assert not (obs["is_first"] and (obs["is_last"] or obs["reward"] != 0))
        fresh = obs["is_last"]
    for space in env.act_space.values():
        if isinstance(space, spaces.Box):
            assert space.dtype == np.float32 and (space.low == -1).all() and (space.high == 1).all()
            assert len(space.shape) == 1
    return stream


def check_value(space, value):
    kind = kind_of(space)
    if kind in ("image", "audio"):
        assert value.dtype == space.dtype and value.shape == space.shape and value.flags.c_contiguous
        assert value.dtype == np.uint8 or (kind == "audio" and value.dtype == np.float32 and np.isfinite(value).all())
    elif isinstance(space, spaces.Box):
        assert space.dtype == value.dtype == np.float32 and value.shape == space.shape and len(value.shape) == 1
        assert np.isfinite(value).all()
    elif isinstance(space, spaces.Discrete):
        assert space.start == 0 and value.dtype == np.int32 and value.shape == () and 0 <= value < space.n
    else:
        assert isinstance(space, spaces.MultiDiscrete) and (space.start == 0).all()
        assert value.dtype == np.int32 and value.shape == space.nvec.shape == (len(space.nvec),)
        assert (value >= 0).all() and (value < space.nvec).all()


def end_of_episode(env, action):
    """Play an episode with a constant action; return its number of steps, rewards and last observation."""
    env.reset()
    rewards = []
    while True:
        obs = env.step(action)
        rewards.append(float(obs["reward"]))
        if obs["is_last"]:
            return len(rewards), rewards, obs


def run_python(code, **environ):
    kept = {key: value for key, value in os.environ.items() if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, env={**kept, **environ}, capture_output=True, text=True, timeout=60)
