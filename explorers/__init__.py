"""How to collect what is new: noise on actions, and sources of intrinsic reward, one file for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.nn as nn

from explorers.empowerment import Empowerment
from explorers.icm import ICM
from explorers.plan2explore import Plan2Explore
from explorers.rnd import RND
from models import Rollout, WorldModel
from ops.random import rand, randn
from rssm import State, feature


class Explorer(Protocol):
    """A source of intrinsic reward: a torch module that learns beside the world model. Letters as in models.py.

    So that an update can be recorded as a CUDA graph, state changes in place and nothing waits for the host.
    weight: of its reward beside those of others, times `expl_intr_scale`.
    """

    weight: float

    def losses(
        self, world: WorldModel, states: State, batch: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the explorer's losses {name: (B, ...)}, and {name: tensor} of which the means are logged.

        No gradient reaches the world model. Names of losses begin with intrinsic/, which is put before the others.
        states: posterior State (B, T, ...); batch: {key: (B, T, ...)} with action, is_first, embed (B, T, E).
        """

    def rewards(self) -> dict[str, Callable[[Rollout], torch.Tensor]]:
        """Return {name: function of a Rollout -> (H + 1, N)}, the reward on arriving in each state."""


NONE: Mapping[str, Any] = MappingProxyType({})


class Rewards:
    """The rewards of a behavior: called with a Rollout, the weighted sum (H + 1, N) of all its rewards.

    Args:
      parts: {name: function of a Rollout -> (H + 1, N)}, on arriving; `extr` is the task's, all others are intrinsic.
      scales: {name: weight}, those that are not 1; intr_scale: number or 0-d tensor, a factor of all intrinsic ones.

    A behavior of several levels takes those that each of them seeks, `rewards.only("extr", "icm")`, or all by name.
    """

    def __init__(self, parts: Mapping[str, Callable[[Rollout], torch.Tensor]], scales: Mapping = NONE, intr_scale=1.0):
        self.parts, self.scales, self.intr_scale = dict(parts), dict(scales), intr_scale

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return self.weighed({name: part(rollout) for name, part in self.parts.items()})

    def only(self, *names: str) -> Rewards:
        """Return the rewards of these names, one at least, weighed as they are here."""
        return Rewards({name: self.parts[name] for name in names}, self.scales, self.intr_scale)

    def unweighed(self, name: str) -> Rewards:
        """Return one of the rewards, with a weight of 1."""
        return Rewards({name: self.parts[name]})

    def weighed(self, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """{name: tensor} of all parts -> their weighted sum."""
        first, *rest = [times(self.scale(name), reward) for name, reward in found.items()]
        return sum(rest, first)

    def scale(self, name: str) -> Any:
        """Return the weight of a reward: a number, or a 0-d tensor where that of the intrinsic ones learns."""
        return self.scales.get(name, 1.0) * (1.0 if name == "extr" else self.intr_scale)

    @torch.no_grad()
    def replayed(self, states: State, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return {name: (B, T)}, not weighed, of replayed steps. Where an episode begins nothing intrinsic is paid.

        states: State (B, T, ...); batch: {key: (B, T, ...)} with action, is_first and the task's reward.
        """
        states = states.map(lambda x: x.detach().transpose(0, 1))  # (T, B, ...)
        sequence, led = Rollout(states, batch["action"].transpose(0, 1)[1:], feature(states)), ~batch["is_first"]
        parts = self.parts.items()
        return {name: batch["reward"] if name == "extr" else part(sequence).T * led for name, part in parts}


def times(scale, reward):
    """Return scale * reward, without a product where the scale is the number 1."""
    return reward if isinstance(scale, float) and scale == 1 else scale * reward


def make_explorers(world, act_spec, config):
    """Return the explorers of a configuration, {name: Explorer}: that of expl_behavior, and those of intrinsic."""
    names = dict.fromkeys([config.expl_behavior, *config.intrinsic])
    return nn.ModuleDict({name: EXPLORERS[name](world, act_spec, config) for name in names if name in EXPLORERS})


def task_rewards(world, explorers, config):
    """Return the Rewards of the task's behavior: the task's own, and those of the explorers that `intrinsic` names.

    The task's weigh 1 where `expl_extr_scale` is 0: what only explores is a behavior of its own.
    """
    if not config.intrinsic:
        return Rewards({"extr": world.rewards})
    parts, scales = weighed_parts([explorers[name] for name in config.intrinsic])
    scales["extr"] = config.expl_extr_scale or 1.0
    return Rewards({"extr": world.rewards, **parts}, scales, config.expl_intr_scale)


def explorer_rewards(world, explorer, config):
    """Return the Rewards of an explorer's own behavior: its own, and the task's if that has a weight there."""
    parts, scales = weighed_parts([explorer])
    task = {"extr": world.rewards} if config.expl_extr_scale else {}
    return Rewards({**parts, **task}, {**scales, "extr": config.expl_extr_scale}, config.expl_intr_scale)


def weighed_parts(explorers):
    """Return {name: reward} and {name: weight} of explorers, of which each may have a weight of its own."""
    parts = [(name, part, explorer) for explorer in explorers for name, part in explorer.rewards().items()]
    scales = {name: explorer.weight for name, _, explorer in parts}
    return {name: part for name, part, _ in parts}, scales


def received(rewards, states, batch, outs):
    """Return a batch whose rewards are those that a behavior learns from, if these are several.

    `reward` (B, T) is then their weighted sum, and `rewards` {name: (B, T)} has each of them. Adds to `outs["shares"]`
    the mean of each intrinsic one, and its share of what all of them pay by their weights.
    """
    shares = outs.setdefault("shares", {})
    if len(rewards.parts) == 1:
        (name,) = rewards.parts
        if f"{name}_reward" in outs.get("explorers", {}):
            shares.setdefault(f"intrinsic/{name}_share", torch.ones_like(batch["reward"][0, 0]))
        return batch
    found = rewards.replayed(states, batch)
    sizes = {name: (rewards.scale(name) * reward).abs().mean() for name, reward in found.items()}
    total = sum(sizes.values()).clamp(min=1e-20)
    for name in found.keys() - {"extr"}:
        shares.setdefault(f"intrinsic/{name}_reward", found[name].mean())
        shares.setdefault(f"intrinsic/{name}_share", sizes[name] / total)
    return {**batch, "reward": rewards.weighed(found), "rewards": found}


def perturb(action, spec, amount):
    """Add exploration noise to actions (N, A): a normal of stddev `amount` on numbers, cut to [-1, 1] (Dreamer);
    every discrete choice is replaced by a uniform one with probability `amount`."""
    parts = {}
    for key, part in spec.split(action).items():
        if key in spec.classes:
            parts[key] = torch.cat([redraw(choice, amount) for choice in part.split(spec.classes[key], -1)], -1)
        else:
            parts[key] = (part + amount * randn(part.shape, part.device)).clamp(-1, 1)
    return spec.join(parts)


def redraw(choice, chance):
    """Replace one-hots (N, k) by uniform ones with a given chance."""
    other = rand(choice.shape, choice.device).argmax(-1, keepdim=True)
    other = torch.zeros_like(choice).scatter_(-1, other, 1.0)
    return torch.where(rand((len(choice), 1), choice.device) < chance, other, choice)


# Name -> class made from the WorldModel, the ActionSpec and the whole configuration
EXPLORERS: dict[str, Callable[[Any, Any, Any], Explorer]] = {
    "plan2explore": Plan2Explore,
    "icm": ICM,
    "rnd": RND,
    "empowerment": Empowerment,
}
