"""How to act in a world model, and how that is learned: one file for each behavior but the default, in models.py."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from behaviors.separate import SeparateCritics
from explorers import Rewards
from models import Rollout, WorldModel
from rssm import State
from tools import UserError

# name -> (module, class in it, made from the width of the features, the ActionSpec and the whole configuration)
BEHAVIORS = {
    "actor_critic": ("models", "ImagBehavior"),
    "dynamics": ("behaviors.dynamics", "DynamicsBehavior"),
    "dreamerv3_2023": ("behaviors.dreamerv3_2023", "DreamerV3of2023"),
    "dreamerv2": ("behaviors.dreamerv2", "DreamerV2"),
    "dreamerv1": ("behaviors.dreamerv1", "DreamerV1"),
    "cem": ("behaviors.cem", "CEM"),
    "ppo": ("behaviors.ppo", "PPO"),
    "hierarchical_ppo": ("behaviors.hierarchy", "HierarchicalPPO"),
}
# What an explorer's own behavior is where the task's plans, or has a manager: one policy finds as many cells of a maze
# as a hierarchy of its own does, in less time (docs/motivation.md). A manager is curious by `intrinsic`.
EXPLORING = dict.fromkeys(("cem", "hierarchical_ppo"), "actor_critic")


class Behavior(Protocol):
    """A way to act in a world model, and to learn that: a torch module, perhaps without parameters.

    Letters as in models.py. One that is after recurrent states may have a method `goal` that returns those of a carry,
    (N, D), for films to show. The agent freezes the world model around `rollout` and `losses`. So that an update can be
    recorded as a CUDA graph, state changes in place and nothing waits for the host.
    """

    def optimized(self) -> dict[str, torch.nn.Module]:
        """Return {name of a group of the agent's optimizer: module}; with Adam, `critic` has its own settings, others
        actor_opt. What is in none of them is left alone by the agent, for `improve` to train."""

    def policies(self) -> dict[str, torch.nn.Module]:
        """Return {name: module} of what `act` computes with; {} for a behavior that plans."""

    def compile_parts(self) -> None:
        """Compile what learning spends its time in."""

    def initial(self, count: int, device: torch.device) -> Any:
        """Return the behavior's own carry before the first step: a tree of tensors (count, ...), () for none.

        `act` returns the same shapes and dtypes; the agent starts leaves anew where an episode does.
        """

    def act(self, world: WorldModel, state: State, carry: Any, mode: str) -> tuple[torch.Tensor, Any]:
        """Choose actions (N, A) in posterior states (N, ...); return them and the next carry.

        mode: "mode" for the best action, anything else for one to learn from.
        """

    def rollout(self, world: WorldModel, states: State) -> Rollout | None:
        """Imagine from states (B, T, ...), every one or the same of each sequence, N in all; without gradient towards
        them and with a fresh carry."""

    def losses(
        self,
        world: WorldModel,
        rollout: Rollout | None,
        batch: Mapping[str, torch.Tensor],
        rewards: Rewards,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return losses {name: (H or fewer, N)} of the imagined trajectories, and {name: tensor} for metrics.

        They are joined with the world model's in one backward pass. `rewards(rollout)` is (H + 1, N), on arriving;
        it has its parts by name, the task's `extr` among them.
        """

    def replay_losses(
        self, world: WorldModel, states: State, batch: Mapping[str, torch.Tensor], outs: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return losses {name: (B, ...)} of the replayed states (B, T, ...), which carry gradient.

        batch: its `reward` is the weighted sum of all rewards; where these are several, `rewards` {name: (B, T)} has
        each of them. outs: the second of what `losses` returned.
        """

    def metrics(self, outs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return 0-d metrics of the second of what `losses` returned."""

    def improve(self, rollout: Rollout | None, outs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Do what follows the gradient step: slow critics, or epochs of an optimizer of the behavior's own.

        outs: the second of what `losses` returned. Returns: {name: 0-d metric}.
        """


def make_behavior(name: str, feat_size: int, act_spec: Any, config: Any, rewards: Rewards | None = None) -> Behavior:
    """Return the `Behavior` of a name; an actor_critic whose `actor.grad` asks for the dynamics is DynamicsBehavior.

    Args:
      feat_size: width of the features; act_spec: ActionSpec; config: the whole configuration.
      rewards: what it will seek; if these are several, each may have a critic of its own (`expl_critics`), and what
        plans is told of them here.
    """
    if name == "actor_critic" and config.actor.grad != "reinforce":
        name = "dynamics"
    module, kind = BEHAVIORS[name]
    make = functools.partial(getattr(importlib.import_module(module), kind), feat_size, act_spec, config)
    behavior = make()
    if rewards is None or len(rewards.parts) == 1:
        return behavior
    if not behavior.policies():
        behavior.rewards = rewards
    elif config.expl_critics == "separate":
        if not behavior.optimized():
            raise UserError(f"--expl_critics separate: --behavior {name} learns from one joint reward")
        names = [part for part in rewards.parts if rewards.scale(part)]
        parts = dict(zip(names, [behavior, *(make() for _ in names[1:])], strict=True))
        return SeparateCritics(parts, {name: rewards.scale(name) for name in names})
    return behavior
