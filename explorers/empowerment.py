"""Empowerment: how many futures one can tell apart and choose among (arXiv:1509.08731)."""

from types import SimpleNamespace

import torch
import torch.nn as nn

from networks import Actor
from ops.layers import MLP, Linear, Style
from ops.random import rand
from rssm import feature

# Of both distributions over actions. The planner's deviation has a floor: where the dynamics is deterministic, the
# bound would grow without end with the precision of a continuous action that is told from its outcome.
ACTIONS = SimpleNamespace(dist="truncated_normal", min_std=0.1, max_std=1.0, unimix=0.01, outscale=0.01)


class Plans(nn.Module):
    """A distribution over sequences of K actions given a context: each action given those before it.

    Args:
      inputs: width of the context; act_spec: ActionSpec; steps: K.
      layers, units: of the one network, which is told the actions so far and how many these are; style: Style.
    """

    def __init__(self, inputs, act_spec, steps, layers, units, style):
        super().__init__()
        self.steps, width = steps, inputs + (act_spec.size + 1) * (steps - 1)
        self.actor = Actor(width, act_spec, SimpleNamespace(**vars(ACTIONS), layers=layers, units=units), style)

    def contexts(self, context, actions):
        """Context (N, C) and the actions so far (k, N, A) -> what the next one is drawn from (N, inputs)."""
        if self.steps == 1:
            return context
        missing = self.steps - 1 - len(actions)
        told = nn.functional.pad(actions, (1, 0), value=1.0)  # a mark before every action that there is
        told = nn.functional.pad(told, (0, 0, 0, 0, 0, missing))  # (K - 1, N, 1 + A)
        return torch.cat([context, told.transpose(0, 1).flatten(1).to(context.dtype)], -1)

    def sample(self, context):
        """Context (N, C) -> actions (K, N, A)."""
        actions = []
        noise = self.actor.noise((self.steps, len(context)), context.device)
        for step in range(self.steps):
            so_far = torch.stack(actions) if actions else context.new_zeros(0, len(context), self.actor.spec.size)
            actions.append(self.actor(self.contexts(context, so_far)).sample(noise[step]))
        return torch.stack(actions)

    def log_prob(self, context, actions):
        """Context (N, C), actions (K, N, A) -> log-probability of the sequence (N,)."""
        inputs = torch.stack([self.contexts(context, actions[:step]) for step in range(self.steps)])
        return self.actor(inputs).log_prob(actions).sum(0)


class Empowerment(nn.Module):
    """Reward states from which one can bring about many different futures, and know which.

        E(s) = max_w I(a; s' | s) >= E_{w(a | s) p(s' | s, a)} [log q(a | s, s') - log w(a | s)],    a of K actions

        planner  q      minimizes -log q(a | s, s'), a ~ w
        source   w, psi minimize (beta log q(a | s, s') - log w(a | s) - psi(s))^2, q held
        estimate E      minimizes 1/2 (log q - log w - E(s))^2, both held

    The best w is proportional to exp(beta E log q), psi its normalizer. beta rises to 1 from near 0: w is then uniform.
    In the paper psi / beta stands for E, which it is at beta = 1 alone; the estimate is the bound at any beta. In a
    terminal state there is nothing left to choose: its estimate learns 0.

    s' is imagined by the world model from s with the K actions, and is what would be observed there: the state itself
    has been told the actions, so that every one would count, even against a wall. `seen` predicts the embedding from a
    state. What it misses in a replayed state is added to what it says of an imagined one, so that no outcome is told
    from another by less than its error.

    Args:
      world: WorldModel; act_spec: ActionSpec.
      config: the whole configuration, with empowerment.steps K, layers, width, and anneal, the updates until beta is 1.
    """

    def __init__(self, world, act_spec, config):
        super().__init__()
        c, style = config.empowerment, Style(config.norm, config.act, config.init)

        def net(outputs, outscale):
            mlp = MLP(world.feat_size, c.layers, c.width, style)
            return nn.Sequential(mlp, Linear(c.width, outputs, outscale, style.out))

        self.steps, self.anneal = c.steps, c.anneal
        self.weight = c.scale
        self.source = Plans(world.feat_size, act_spec, c.steps, c.layers, c.width, style)
        self.planner = Plans(world.feat_size + world.encoder.size, act_spec, c.steps, c.layers, c.width, style)
        self.normalizer, self.estimate = net(1, 0.0), net(1, 0.0)
        self.seen = net(world.encoder.size, 1.0)
        self.register_buffer("updates", torch.zeros(()))

    def losses(self, world, states, batch):
        """Return {name: (B, T)} and what came up; see `Explorer`."""
        lead = batch["is_first"].shape
        start = states.map(lambda x: x.detach().flatten(0, 1))  # (N, ...)
        feat, embed = feature(start), batch["embed"].detach().flatten(0, 1)  # (N, F), (N, E)
        shown = self.seen(feat)
        with torch.no_grad():
            plans = self.source.sample(feat)  # (K, N, A)
            outcome = self.outcome(world, start, plans, embed - shown)  # (N, E)
        logw = self.source.log_prob(feat, plans)  # (N,)
        logq = self.planner.log_prob(torch.cat([feat, outcome.to(feat.dtype)], -1), plans)
        psi, value = (net(feat).float()[..., 0] for net in (self.normalizer, self.estimate))
        alive, beta = 1 - batch["is_terminal"].flatten().float(), self.beta()
        bound = (logq - logw).detach() * alive
        self.updates += 1
        losses = {
            "planner": -logq * alive,
            "source": (beta * logq.detach() - logw - psi).square() * alive,
            "estimate": 0.5 * (bound - value).square(),
            "seen": 0.5 * (shown - embed).float().square().mean(-1),
        }
        losses = {f"intrinsic/empowerment_{name}": loss.unflatten(0, lead) for name, loss in losses.items()}
        return losses, {
            "empowerment": value.detach(),
            "empowerment_reward": value.detach().clamp(min=0),
            "empowerment_bound": bound,
            "empowerment_beta": beta,
        }

    def outcome(self, world, start, plans, missed):
        """Return what would be observed (N, E) after actions (K, N, A) from states (N, ...).

        missed: (N, E) of `seen` in replayed states; each goes to another one, at random.
        """
        states, _ = world.rssm.imagine(start, plans, self.steps)
        others = rand((len(missed),), missed.device).argsort()
        return self.seen(feature(states.map(lambda x: x[-1]))) + missed[others]

    def beta(self):
        """Return how much the source heeds the planner: a 0-d tensor."""
        return (self.updates / self.anneal).clamp(0.01, 1)

    def rewards(self):
        """Return the one reward: the empowerment of where one arrives, and not what an action adds to it."""
        return {"empowerment": self.reward}

    def reward(self, rollout):
        """Return the estimate in each state (H + 1, N), which is never negative."""
        return self.estimate(rollout.feat).float()[..., 0].clamp(min=0)
