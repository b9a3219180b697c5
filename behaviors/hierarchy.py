"""A manager that chooses goals and a worker that reaches them (Director, arXiv:2206.04114), both learning by PPO."""

import itertools
from typing import NamedTuple

import torch
import torch.nn as nn

from behaviors.goals import GoalAutoencoder, Novelty
from behaviors.ppo import PPO
from rssm import State, feature
from specs import ActionSpec
from tools import UserError


class Plan(NamedTuple):
    """Trajectories that a hierarchy imagined: a `models.Rollout` with what its manager chose.

    codes: (H / k, N, G C) the manager's actions; goals: (H / k, N, D) what they were decoded into.
    """

    states: State
    actions: torch.Tensor
    feat: torch.Tensor
    codes: torch.Tensor
    goals: torch.Tensor


class HierarchicalPPO(nn.Module):
    """Every k steps the manager chooses a code, which is decoded into a goal, a recurrent state that the worker seeks.

        state       s_0        s_1   ...   s_k               s_k+1   ...   s_2k
        goal        g_0        g_0         g_k               g_k
        worker      sees [s_t, g], is paid for how near deter_t+1 is to g, in a terminal state for `staying` there;
                    a piece ends with a value in s_k under its g
        manager     sees s_0 and s_k; a choice is paid sum_i (c_1 ... c_i-1) R_i over its k steps, and what follows it
                    counts c_1 ... c_k, with c the predicted continuation times the discount gamma = 1 - 1 / horizon

    The manager's discount is thus gamma^k, and its values are those of the task in steps (a semi-Markov decision
    process); Director takes gamma for each choice, and for the reward of one the mean over its steps. R is
    hierarchy.extr_scale times the reward that the agent hands over, the task's or what it adds to it, and
    hierarchy.expl_scale times the autoencoder's error on arriving, in standard deviations from its running mean.
    Director has a critic for each; here one critic learns their sum. The worker sees nothing of the task's reward.

    One trajectory of H steps, a multiple of k, teaches both. It begins with a fresh goal, so that the replay stores
    none. The autoencoder learns from the states that it starts in.

    Args:
      feat_size: width of the features (F); act_spec: ActionSpec; config: the whole configuration, with `hierarchy`.
    Raises UserError unless imag_horizon is a multiple of hierarchy.every.
    """

    def __init__(self, feat_size, act_spec, config):
        super().__init__()
        c, deter = config.hierarchy, config.rssm.deter
        if config.imag_horizon % c.every:
            raise UserError(
                f"--imag_horizon {config.imag_horizon} is no multiple of --hierarchy.every {c.every}: "
                f"the preset hierarchical has both"
            )
        self.every, self.horizon = c.every, config.imag_horizon
        self.extr_scale, self.expl_scale = c.extr_scale, c.expl_scale
        self.goals, self.novelty = GoalAutoencoder(deter, config), Novelty()
        codes = ActionSpec({"code": self.goals.size}, {"code": [c.classes] * c.groups})
        self.worker = PPO(feat_size + deter, act_spec, config)
        self.manager = PPO(feat_size, codes, config)

    def optimized(self):
        """There is nothing for the agent's optimizer."""
        return {}

    def policies(self):
        """Return {name: module} of what acts."""
        return {"worker": self.worker.actor, "manager": self.manager.actor, "goals": self.goals.decoder}

    def compile_parts(self):
        """Compile a step in imagination and what learning spends its time in."""
        for part in (self.worker, self.manager, self.goals):
            part.compile_parts()
        self.move = torch.compile(self.move, dynamic=False)

    # -- acting

    def initial(self, count, device):
        """Return no goal (N, D), and that none was chosen yet: the steps since then (N,), modulo k."""
        width = self.goals.decoder[-1].kernel.shape[1]
        return torch.zeros(count, width, device=device), torch.zeros(count, dtype=torch.int64, device=device)

    def act(self, world, state, carry, mode):
        """Choose actions (N, A), and first, where one is due, a goal; both by their modes if `mode` is "mode"."""
        goal, age = carry
        code, _ = self.manager.act(world, state, (), mode)
        goal = torch.where((age == 0)[:, None], self.goals.decode(code), goal)
        policy = self.worker.actor(with_goal(feature(state), goal))
        noise = None if mode == "mode" else self.worker.actor.noise(age.shape, age.device)
        return policy.mode() if noise is None else policy.sample(noise), (goal, (age + 1) % self.every)

    def goal(self, carry):
        """Return the goals (N, D) that a carry holds."""
        return carry[0]

    def move(self, deter, stoch, goal, noise):
        """Draw actions (N, A) in states (N, D), (N, S, K) with goals (N, D), by the actor's noise (N, n)."""
        return self.worker.actor(with_goal(feature(State(deter, stoch)), goal)).sample(noise)

    # -- learning

    @torch.no_grad()
    def rollout(self, world, states):
        """Imagine from every state (B, T, ...), with a goal chosen there and after every k steps: a Plan."""
        start = states.map(lambda x: x.detach().flatten(0, 1))  # (N, ...)
        count, device = len(start.deter), start.deter.device
        acting = iter(self.worker.actor.noise((self.horizon, count), device))
        choosing = iter(self.manager.actor.noise((self.horizon // self.every, count), device))
        steps, codes, goals = itertools.count(), [], []

        def act(state):
            if next(steps) % self.every == 0:
                codes.append(self.manager.policy(*state, next(choosing)))
                goals.append(self.goals.decode(codes[-1]))
            return self.move(*state, goals[-1], next(acting))

        states, actions = world.rssm.imagine(start, act, self.horizon)
        return Plan(states, actions, feature(states), torch.stack(codes), torch.stack(goals))

    def actor_loss(self, world, rollout, rewards, outs):
        """Return the manager's loss over whole trajectories, as `PPO.actor_loss`."""
        with torch.no_grad():
            reward, cont = rewards(rollout), world.discounts(rollout.feat)
            novelty = self.novelty(self.goals.error(rollout.states.deter.float()))
        mixed, weight, k = self.extr_scale * reward + self.expl_scale * novelty, cont.cumprod(0), self.every
        estimated = rollout.feat[::k], rollout.codes, *decisions(mixed, cont, k), weight[::k]
        return self.manager.whole_loss(*estimated, outs["manager_logpi"])

    @torch.no_grad()
    def losses(self, world, rollout, batch, rewards):
        """Return no loss, and {name: tensor} of what `improve` learns from, by names that begin with whose it is."""
        feat, deter, k = rollout.feat, rollout.states.deter.float(), self.every
        reward, cont, error = rewards(rollout), world.discounts(feat), self.goals.error(deter)  # (H + 1, N)
        mixed, weight = self.extr_scale * reward + self.expl_scale * self.novelty(error), cont.cumprod(0)
        manager = self.manager.estimate(feat[::k], rollout.codes, *decisions(mixed, cont, k), weight[::k])
        near = self.goals.near(rollout.goals.flatten(0, 1), pieces(deter, k))  # (k + 1, P N)
        lasting, own = pieces(cont, k), pieces(weight, k)
        paid = staying(near, lasting, self.worker.discount)
        worker = self.worker.estimate(self.worker_feat(rollout), pieces(rollout.actions, k, 0), paid, lasting, own)
        outs = {"reward": reward, "error": error, "near": near[-1]}
        outs |= {f"manager_{name}": value for name, value in manager.items()}
        return {}, outs | {f"worker_{name}": value for name, value in worker.items()}

    def worker_feat(self, rollout):
        """Return what the worker sees of a Plan, piece by piece: (k + 1, P N, F + D)."""
        feat = pieces(rollout.feat, self.every)
        return with_goal(feat, rollout.goals.flatten(0, 1).expand(len(feat), -1, -1))

    def replay_losses(self, world, states, batch, outs):
        """Nothing is learned from replayed rewards."""
        return {}

    def improve(self, rollout, outs=None):
        """Let worker, manager and autoencoder learn; return {name: 0-d metric}."""
        parts = {"worker": (self.worker_feat(rollout), pieces(rollout.actions, self.every, 0))}
        parts["manager"] = rollout.feat[:: self.every], rollout.codes
        metrics = {}
        for name, trajectories in parts.items():
            own = getattr(self, name).learn(*trajectories, part_of(outs, name))
            metrics |= {f"{name}_{key}": value for key, value in own.items()}
        return metrics | self.goals.learn(rollout.states.deter[0].float())

    def metrics(self, outs):
        """Return 0-d metrics of what `losses` returned; worker_success is the share of goals whose max-cosine was above
        0.7 when their time was over (Director)."""
        metrics = {"imag_reward": outs["reward"].mean(), "goal_novelty": outs["error"].mean()}
        for name in ("worker", "manager"):
            metrics |= {f"{name}_{k}": v for k, v in getattr(self, name).metrics(part_of(outs, name)).items()}
        near = outs["near"]
        return metrics | {"worker_cosine": near.mean(), "worker_success": (near > 0.7).float().mean()}


def with_goal(feat, goal):
    """Features (..., F) and goals (..., D) -> what the worker sees (..., F + D)."""
    return torch.cat([feat, goal.to(feat.dtype)], -1)


def part_of(outs, name):
    """Return what of {name: tensor} is the worker's or the manager's, by its name there."""
    return {key.removeprefix(f"{name}_"): value for key, value in outs.items() if key.startswith(f"{name}_")}


def pieces(x, every, more=1):
    """Cut trajectories into those under one goal: (P k + more, N, ...) -> (k + more, P N, ...).

    With `more` of 1, of states, a piece ends in the state in which the next one begins.
    """
    starts = range(0, len(x) - more, every)
    return torch.stack([x[start : start + every + more] for start in starts], 1).flatten(1, 2)


def staying(reward, cont, discount):
    """Return rewards (...) on arriving that pay in a terminal state at once what staying there for good would.

        r + (discount - cont) (r + discount r + discount^2 r + ...),      cont the discount (...) of what follows

    A worker is paid as long as it is near: else it would keep away from a goal that ends the episode, and where goals
    are far, and max-cosines negative, an end anywhere would be as good as any.
    """
    return reward * (1 + (discount - cont) / (1 - discount))


def decisions(reward, cont, every):
    """Return rewards and discounts of decisions that last k steps, from those of the steps.

        R[d] = sum_i (c[b + 1] ... c[b + i-1]) r[b + i],  i = 1 ... k
        C[d] = c[b + 1] ... c[b + k],                     b = (d - 1) k

    Args:
      reward, cont: (P k + 1, N) reward on arriving, discount of what follows.
    Returns: the same of the P + 1 states in which a decision is made or the last one ends, (P + 1, N) each.
    """
    reward, own = reward[1:].unflatten(0, (-1, every)), cont[1:].unflatten(0, (-1, every))  # (P, k, N)
    before = torch.cat([torch.ones_like(own[:, :1]), own[:, :-1].cumprod(1)], 1)
    total = (before * reward).sum(1)
    return torch.cat([torch.zeros_like(total[:1]), total]), torch.cat([cont[:1], own.prod(1)])
