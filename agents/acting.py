"""The acting step of a Dreamer as a function of named tensors, to be exported: noise and carry come in, and go out."""

import contextlib
import itertools

import numpy as np
import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ops.random import drawing_from, make_generator
from tools import UserError, derive_seed

CARRY = ("deter", "stoch", "action")  # the leaves that every agent carries; a behavior may have more
STREAM = derive_seed(0, 5)  # of what is drawn where nothing shall depend on chance


class Certain:
    """A kind of latent whose samples are its modes: an RSSM that has it is a function of what it sees.

    latent: `rssm.Latent`.
    """

    def __init__(self, latent):
        self.latent = latent

    def __getattr__(self, name):
        return getattr(self.latent, name)

    def noise(self, shape, device):
        """Return what nobody uses, with the batch shape that a scan over time needs."""
        return torch.zeros(shape, device=device)

    def dist(self, params):
        return ModeOnly(self.latent.dist(params))


class ModeOnly:
    """A distribution whose samples are its mode."""

    def __init__(self, dist):
        self.dist = dist

    def sample(self, noise):
        return self.dist.mode()

    def mode(self):
        return self.dist.mode()


@contextlib.contextmanager
def certain(agent):
    """Let a Dreamer act without chance in the body: latents are modes, and what else is drawn is always the same.

    A behavior without a policy, which plans, draws its plans and what follows from them as it always does, but from
    the same stream at every step.
    """
    rssm, generators = agent.world.rssm, agent.generators
    latent, generator = rssm.latent, generators["act"]
    generators["act"] = make_generator(STREAM, agent.device)
    rssm.latent = Certain(latent) if agent.behavior.policies() else latent
    try:
        yield
    finally:
        rssm.latent, generators["act"] = latent, generator


class ActingStep(nn.Module):
    """(observation, carry, noise) -> (action, carry), as `Dreamer.choose` computes it.

    Inputs and outputs are dicts of tensors, N of each: `obs.<key>` as the agent sees it, `is_first` bool,
    `carry.<name>` and, in the mode `sample`, `noise.<i>` come in; `action.<key>` and `next.<name>`, the next carry, go
    out.

    Args:
      agent: Dreamer in float32 on the CPU; mode: "sample", or "mode" for the latent's and the policy's modes.
      decoders: {action key: function of its part (N, width) that returns what is told of it}.
    Attributes:
      carried, outputs: names of the carry's tensors, and of what a step returns.
      draws: [(kind, shape at N = 2, its axis of N)] of the noise, in order.
    Raises UserError for an agent that has no policy.
    """

    def __init__(self, agent, mode, decoders):
        super().__init__()
        if not hasattr(agent, "world"):
            if hasattr(agent, "vision"):
                raise UserError("World Models have no exported form; load_agent lets them act")
            raise UserError("the random agent has nothing to export: it draws its actions")
        if not agent.behavior.policies():
            raise UserError("an agent that plans in its world model has no policy to export; load_agent lets it act")
        parts = {"encoder": agent.world.encoder, "rssm": agent.world.rssm, **agent.behavior.policies()}
        self.parts = nn.ModuleDict(parts)
        self.agent, self.mode, self.decoders = agent, mode, decoders
        leaves, self.tree = tree_flatten(agent.initial(1))
        self.carried = [f"carry.{name}" for name in (*CARRY, *range(len(CARRY), len(leaves)))]
        self.outputs = [f"action.{key}" for key in agent.act_spec.widths] + [*map(self.next_of, self.carried)]
        self.draws = self.record()
        generator = make_generator(STREAM, agent.device)
        for index, (kind, shape, axis) in enumerate(self.draws if mode == "mode" else ()):
            alone = [1 if place == axis else size for place, size in enumerate(shape)]
            self.register_buffer(f"constant_{index}", draw(kind, alone, generator))

    def record(self):
        """Return what a step draws: see `draws`."""
        seen = []
        for count in (2, 3):
            found = []

            def note(kind, shape, found=found):
                found.append((kind, tuple(shape)))
                return draw(kind, shape)

            self.choose(self.start(count), note)
            seen.append(found)
        draws = []
        for (kind, shape), (_, other) in zip(*seen, strict=True):
            draws.append((kind, shape, [*map(int.__ne__, shape, other)].index(True)))
        return draws

    def start(self, count):
        """Return the inputs {name: tensor} before the first step of `count` environments, without noise."""
        inputs = {}
        for key, seen in self.agent.obs_spec.items():
            dtype = torch.uint8 if seen.kind == "image" else torch.int32 if seen.classes else torch.float32
            shape = () if len(seen.classes) == 1 else seen.shape
            inputs[f"obs.{key}"] = torch.zeros(count, *shape, dtype=dtype)
        leaves = [leaf.detach().clone() for leaf in tree_leaves(self.agent.initial(count))]
        return {
            **inputs,
            "is_first": torch.ones(count, dtype=torch.bool),
            **dict(zip(self.carried, leaves, strict=True)),
        }

    def noise(self, count, generator=None):
        """Draw the noise {name: tensor} of a step of `count` environments."""
        shapes = [(kind, [count if i == axis else n for i, n in enumerate(shape)]) for kind, shape, axis in self.draws]
        drawn = {f"noise.{i}": draw(kind, shape, generator) for i, (kind, shape) in enumerate(shapes)}
        return drawn if self.mode == "sample" else {}

    def forward(self, inputs):
        """{name: tensor} -> {name: tensor}"""
        index = itertools.count()

        def given(kind, shape):
            if self.mode == "sample":
                return inputs[f"noise.{next(index)}"]
            return getattr(self, f"constant_{next(index)}").expand(shape)

        carry = self.choose(inputs, given)
        parts = self.agent.act_spec.split(carry.action)
        values = [self.decoders[key](part) for key, part in parts.items()] + tree_leaves(carry)
        return dict(zip(self.outputs, values, strict=True))

    @staticmethod
    def next_of(name):
        """Return the output that is given back as an input `carry.<name>` at the next step."""
        return name.replace("carry.", "next.", 1)

    def carry_of(self, outputs):
        """Return the carry {name: tensor} that the outputs of a step hold."""
        return {name: outputs[self.next_of(name)] for name in self.carried}

    def choose(self, inputs, source):
        """Return the next carry; `source` draws."""
        obs = {key: inputs[f"obs.{key}"] for key in self.agent.obs_spec} | {"is_first": inputs["is_first"]}
        carry = tree_unflatten([inputs[name] for name in self.carried], self.tree)
        sure = certain(self.agent) if self.mode == "mode" else contextlib.nullcontext()
        with torch.no_grad(), sure, drawing_from(source):
            return self.agent.choose(obs, carry, self.mode)


def draw(kind, shape, generator=None):
    """Draw "uniform" numbers in [0, 1), or "normal" ones, of a shape."""
    return {"uniform": torch.rand, "normal": torch.randn}[kind](*shape, generator=generator)


# ---------------------------------------------------------------------------
# From the action vector to what an environment takes


def make_decoder(act_spec, key, native=None):
    """Return the function of an action key's part (N, width) that returns what the environment takes (N, ...).

    Args:
      act_spec: ActionSpec.
      native: function of {key: (width,) array} that does the same for one action and all keys, in NumPy; without it
        numbers stay in [-1, 1], and classes one-hot.
    Raises UserError if `native` is neither affine in numbers nor counts classes.
    """
    if native is None:
        return torch.nn.Identity() if key in act_spec.classes else lambda part: part.clamp(-1, 1)
    zeros = {name: value[0] for name, value in act_spec.zeros(1).items()}

    def one(part):
        return np.asarray(native({**zeros, key: part})[key])

    decoder = counting(act_spec.classes[key], one) if key in act_spec.classes else affine(act_spec.widths[key], one)
    tries = act_spec.uniform(np.random.default_rng(0), 64)[key] * (1 if key in act_spec.classes else 1.5)
    ours, theirs = decoder(torch.from_numpy(tries)).numpy(), np.stack([one(part) for part in tries])
    if ours.dtype != theirs.dtype or not np.allclose(ours, theirs, 1e-5, 1e-5):
        raise UserError(f"action {key}: how it becomes the environment's own cannot be exported")
    return decoder


def counting(classes, one):
    """Return the decoder of one-hots side by side, the first of which stand for what `one` says."""
    firsts = np.concatenate([np.eye(size, dtype=np.float32)[0] for size in classes])
    start = torch.from_numpy(np.array(one(firsts)))

    def decode(part):
        index = torch.stack([choice.argmax(-1) for choice in part.split(classes, -1)], -1)  # (N, n)
        return (index.reshape(-1, *start.shape) + start).to(start.dtype)

    return decode


def affine(width, one):
    """Return the decoder of numbers, whose -1, 0 and 1 stand for what `one` says; integers are rounded."""
    low, middle, high = (torch.from_numpy(np.array(one(np.full(width, x, np.float32)))) for x in (-1, 0, 1))
    dtype = low.dtype
    if not dtype.is_floating_point:
        low, high = low.double(), high.double()
        middle = (low + high) / 2
    half = (high - low) / 2

    def decode(part):
        value = torch.minimum(torch.maximum(middle + half * part.reshape(-1, *low.shape), low), high)
        return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)

    return decode
