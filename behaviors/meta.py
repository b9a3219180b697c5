"""Constants of the behavior that learn by the gradient through its own update (arXiv:1805.09801, 2002.12928)."""

import contextlib
import copy
import functools
import math

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from models import frozen
from ops.collectives import average_
from ops.optim import OwnAdam
from tools import UserError

# name -> (the constant as a function of the number x that is learned, x as a function of the constant)
LEARNED = {
    "entropy": (torch.exp, math.log),
    "lam": (torch.sigmoid, lambda share: math.log(share / (1 - share))),
    "intr_scale": (torch.exp, math.log),
}
BETA, EPS = 0.999, 1e-12  # of the second moment; the floor of its root


class MetaGradients(nn.Module):
    """Learn constants eta of the actor's loss by how the actor does after an update that uses them.

    The imagined trajectories are parted by the sequences that they start from. On one half the actor is updated; on the
    other its new parameters are judged, by a loss whose own constants do not learn:

        theta'(eta) = theta - lr P grad L(theta, eta; first half)
        d eta       = d L0(theta'; second half) / d eta = -(lr P grad L0(theta')) . d/d eta grad L(theta, eta)

    P comes from the optimizer's second moment, without the clip of gradients, and is held constant, as are critic,
    normalizer and world model. Of eta there are the entropy's weight, lambda, and the weight of intrinsic rewards; L0
    has the weight `meta.entropy`, the configured lambda, and the same rewards. Where the weight of intrinsic ones
    learns, L0 has the task's alone and a critic of these, `TaskCritic`. The numbers that eta is made of (a logarithm or
    a logit) are moved by Adam without momentum.

    Args:
      behavior: whose constants learn; names: of `LEARNED`.
      config: the whole configuration, with the section `meta` and the constants to start from.
    Raises UserError if the behavior's actor does not learn by REINFORCE, or a constant starts where it cannot learn.
    """

    def __init__(self, behavior, names, config):
        super().__init__()
        if not hasattr(learner_of(behavior), "return_norm") or getattr(behavior, "share", 0):
            what = "the actor has to learn by REINFORCE (--actor.grad), from one critic (--expl_critics)"
            raise UserError(f"--meta.learn {' '.join(names)}: {what}")
        if "intr_scale" in names and not config.intrinsic:
            raise UserError("--meta.learn intr_scale: there is no intrinsic reward to weigh (--intrinsic)")
        if "intr_scale" in names and config.behavior == "dreamerv1":
            raise UserError("--meta.learn intr_scale: the judge wants a slow critic, and --behavior dreamerv1 has none")
        if "lam" in names and not mixes_returns(behavior, config):
            raise UserError(f"--meta.learn lam: no return mixes others at --imag_horizon {config.imag_horizon}")
        if config.batch_size % 2:
            raise UserError(f"--meta.learn {' '.join(names)}: halves the batch, so --batch_size has to be even")
        self.names, self.lr, self.limit = list(names), config.meta.lr, math.log(config.meta.limit)
        self.judge = {"entropy": config.meta.entropy, "lam": config.lam}
        self.task_critic = None
        if "intr_scale" in names:
            self.judge |= {"intr_scale": 0.0, "expl_scale": 0.0}  # the latter is a manager's
            self.task_critic = TaskCritic(learner_of(behavior), config.ppo.critic_lr)
        start = {"entropy": config.actor.entropy, "lam": config.lam, "intr_scale": config.expl_intr_scale}
        for name in names:
            if not (start[name] > 0 and (name != "lam" or start[name] < 1)):
                raise UserError(f"--meta.learn {name}: {start[name]} is nothing to start from")
        self.register_buffer("first", torch.tensor([LEARNED[name][1](start[name]) for name in names]))
        self.register_buffer("numbers", self.first.clone())
        self.register_buffer("square", torch.zeros_like(self.numbers))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("constants", torch.tensor([float(start[name]) for name in names]), persistent=False)

    def attach(self, behavior, *others):
        """Let a behavior, or its manager, and other objects read the constants that they have attributes for.

        They are views that change in place.

        To be called on the device where it stays. Returns self.
        """
        self.behavior, self.holders = (behavior,), (learner_of(behavior), *others)
        set_constants(self.holders, dict(zip(self.names, self.constants.unbind(), strict=True)))
        return self

    def step(self, world, rollout, outs, batch, rewards, opt):
        """Move the constants; return metrics as 0-d tensors.

        Args:
          rollout: Rollout (H + 1, N, ...) without gradient, from the states of `batch` {key: (B, T, ...)}, B even.
          outs: what the behavior's `losses` found in it.
          rewards: Rewards.
          opt: the optimizer of the actor, whose names begin with behavior.actor, unless it has one of its own.
        """
        names = [name for name, _ in self.holders[0].actor.named_parameters()]
        own = getattr(self.holders[0], "actor_opt", None)
        if own:
            scales = dict(zip(names, own.scales(), strict=True))
        else:
            found = opt.scales([f"behavior.actor.{name}" for name in names])
            scales = {name: found[f"behavior.actor.{name}"] for name in names}
        with frozen(world):
            gradient = self.gradient(world, rollout, outs, batch, rewards, scales)
            if self.task_critic:
                theta = {name: param.detach() for name, param in self.holders[0].actor.named_parameters()}
                loss = ActorLoss(self.behavior[0], self.holders)
                _, seen = loss(theta, self.judge, world, rollout, outs, batch, rewards, self.task_critic)
                self.task_critic.learn(self.holders[0], seen)
        with torch.no_grad():
            self.count += 1
            self.square.lerp_(gradient.square(), 1 - BETA)
            root = (self.square / (1 - BETA**self.count)).sqrt() + EPS
            self.numbers.sub_(self.lr * gradient / root)
            self.numbers.copy_(self.numbers.clamp(self.first - self.limit, self.first + self.limit))
            self.read()
            constants = zip(self.names, self.constants.clone().unbind(), strict=True)
        return {f"meta/{name}": value for name, value in constants}

    def read(self):
        """Fill the constants that others read from the numbers."""
        for place, name in enumerate(self.names):
            self.constants[place] = LEARNED[name][0](self.numbers[place])

    def gradient(self, world, rollout, outs, batch, rewards, scales):
        """Return d L0(theta') / d numbers, see above; scales: {name of a parameter of the actor: lr P}."""
        theta = {name: param.detach().requires_grad_() for name, param in self.holders[0].actor.named_parameters()}
        numbers = self.numbers.detach().requires_grad_()
        eta = {name: LEARNED[name][0](number) for name, number in zip(self.names, numbers.unbind(), strict=True)}
        first, second = halves(rollout, outs, batch)
        loss = ActorLoss(self.behavior[0], self.holders)
        rewards = functools.partial(with_gradient, rewards)
        inner, _ = loss(theta, eta, world, *first, rewards)
        inner = torch.autograd.grad(inner, theta.values(), create_graph=True)
        with torch.no_grad():
            grads = [grad.detach().clone() for grad in inner]
            average_(grads)
            pairs = zip(theta.items(), grads, strict=True)
            moved = {name: param - scales[name] * grad for (name, param), grad in pairs}
        moved = {name: param.requires_grad_() for name, param in moved.items()}
        outer, _ = loss(moved, self.judge, world, *second, rewards, self.task_critic)
        outer = torch.autograd.grad(outer, moved.values())
        average_(outer)
        pull = sum((scales[name] * o * i).sum() for name, o, i in zip(theta, outer, inner, strict=True))
        gradient = -torch.autograd.grad(pull, numbers)[0]
        average_([gradient])
        return gradient

    def state_dict(self):
        """Return the numbers, what moves them, and whose they are."""
        return {**super().state_dict(), "learn": list(self.names)}

    def load_state_dict(self, state):
        """Undo `state_dict`. Raises UserError for the numbers of other constants."""
        state = dict(state)
        learned = state.pop("learn", self.names if len(state["numbers"]) == len(self.names) else ["others"])
        if list(learned) != list(self.names):
            ours, theirs = " ".join(self.names), " ".join(learned)
            raise UserError(f"the checkpoint is of another agent: --meta.learn moved {theirs} there and {ours} here")
        super().load_state_dict({**super().state_dict(), **state})  # an older version had no critic of the task
        self.read()


class TaskCritic(nn.Module):
    """A critic of the task's rewards alone, by which an actor is judged that also seeks others (arXiv:1804.06459).

    The behavior's own predicts the sum of all: beside it the task's rewards seem too few wherever others are expected,
    and every intrinsic one would count against itself. It learns where the behavior's does in imagination, by an Adam.

    Args:
      learner: with critic and slow critic, from which it starts; lr: learning rate.
    """

    def __init__(self, learner, lr):
        super().__init__()
        self.critic, self.slow = copy.deepcopy(learner.critic), copy.deepcopy(learner.slow)
        self.opt = OwnAdam(self.critic.parameters(), lr)

    def learn(self, learner, seen):
        """Learn the returns of trajectories; seen: what `ActorLoss` returns of them with this critic."""
        length = len(seen["adv"])
        dist = self.critic(seen["feat"][:length].detach())
        loss = learner.critic_loss(dist, seen["ret"][:length].detach(), seen["slow"][:length].detach())
        self.opt.step((seen["weight"][:length].detach() * loss).mean())
        with torch.no_grad():
            slow, fast = list(self.slow.parameters()), list(self.critic.parameters())
            rate = learner.slow_rate * (learner.updates % learner.slow_every == 0)
            torch._foreach_lerp_(slow, fast, [rate] * len(slow))


class ActorLoss:
    """The mean policy loss of a behavior with other parameters of its actor and other constants.

    behavior: of which nothing changes, the normalizer included; holders: its learner, and other objects, which hold the
    constants.
    """

    def __init__(self, behavior, holders):
        self.holder, self.holders = Holder(behavior), (behavior, *holders)
        (self.learner,) = {name for name, module in self.holder.named_modules() if module is holders[0]}
        self.buffers = {name: value for name, value in self.holder.named_buffers() if "_opt." not in name}

    def __call__(self, theta, eta, world, rollout, outs, batch, rewards, critic=None):
        """Return the loss (0-d), and {name: tensor} of what it is made of.

        Args:
          theta: {name: tensor} parameters of the actor; eta: {name: tensor or number} constants.
          critic: TaskCritic in place of the behavior's, or None.
        """
        state = {f"actor.{name}": param for name, param in theta.items()}
        for part in ("critic", "slow") if critic else ():
            state |= {f"{part}.{name}": param.detach() for name, param in getattr(critic, part).named_parameters()}
        state = {f"{self.learner}.{name}": param for name, param in state.items()}
        state |= {name: value.clone() for name, value in self.buffers.items()}
        with replaced(self.holders, eta):
            return torch.func.functional_call(self.holder, state, (world, rollout, outs, batch, rewards))


class Holder(nn.Module):
    """A module around a behavior, whose `forward` is its actor's loss as it is written, not compiled."""

    def __init__(self, behavior):
        super().__init__()
        self.behavior = behavior

    def forward(self, world, rollout, outs, batch, rewards):
        if hasattr(self.behavior, "actor_loss"):  # a behavior whose `losses` has none
            return self.behavior.actor_loss(world, rollout, rewards, outs)
        losses, outs = type(self.behavior).losses(self.behavior, world, rollout, batch, rewards)
        return losses["policy"].mean(), {**outs, "feat": rollout.feat}


def learner_of(behavior):
    """Return the part of a behavior whose constants learn: its manager, if it has one."""
    return getattr(behavior, "manager", behavior)


def mixes_returns(behavior, config):
    """True if lambda enters a return that the actor learns from: the last one is a reward and a value."""
    choices = config.imag_horizon // (config.hierarchy.every if learner_of(behavior) is not behavior else 1)
    return choices >= (3 if config.behavior in ("dreamerv1", "dreamerv2") else 2)  # there it skips the first return


def with_gradient(rewards, rollout):
    """Return what Rewards pay for a Rollout (H + 1, N), with a gradient towards the weight of the intrinsic ones."""
    found = {name: part(rollout) for name, part in rewards.parts.items()}
    with torch.enable_grad():
        return rewards.weighed(found)


def halves(rollout, outs, batch):
    """Part trajectories (H + 1, N, ...), what was found of their policies, and the batch {key: (B, T, ...)} that they
    start from: two such triples."""
    outs = {name: value for name, value in outs.items() if name.endswith("logpi")}
    count, sequences = len(batch["reward"]) // 2, rollout.actions.shape[1] // 2
    return [
        (
            *tree_map(lambda x, part=part: x[:, part * sequences :][:, :sequences], (rollout, outs)),
            {key: value[part * count :][:count] for key, value in batch.items()},
        )
        for part in (0, 1)
    ]


def set_constants(holders, constants):
    """Give objects the constants {name: value} that they have an attribute for."""
    for holder in holders:
        for name, value in constants.items():
            if hasattr(holder, name):
                setattr(holder, name, value)


@contextlib.contextmanager
def replaced(holders, constants):
    """Let objects have other constants in the body."""
    before = [{name: getattr(holder, name) for name in constants if hasattr(holder, name)} for holder in holders]
    set_constants(holders, constants)
    try:
        yield
    finally:
        for holder, values in zip(holders, before, strict=True):
            set_constants([holder], values)
