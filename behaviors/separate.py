"""A critic and a scale of returns for each reward, as danijar's DreamerV3 of 2023 and Director have them."""

import torch.nn as nn


class SeparateCritics(nn.Module):
    """A behavior whose actor seeks several rewards, each judged by a critic and a return scale of its own.

        policy loss = -weight (sum_i scale_i objective_i + eta entropy)

    objective_i is what the behavior's actor climbs for reward i alone, such as its advantage divided by the scale of
    its returns. So a reward counts by its weight and not by its size, as far as that scale goes.

    Args:
      parts: {name of a reward: Behavior that learns from it}, alike; the first one's actor is everyone's.
      scales: {name: weight}, none of them 0.
    """

    def __init__(self, parts, scales):
        super().__init__()
        self.parts, self.scales = nn.ModuleDict(parts), {name: scales[name] for name in parts}
        self.first, *others = self.parts.values()
        for part in others:
            part.actor = self.first.actor
        for name, part in self.parts.items():  # the parts' entropies add up to one, whatever they are weighed by
            part.entropy = part.entropy / (len(parts) * self.scales[name])

    def optimized(self):
        """Return {name of an optimizer's group: module}."""
        groups = [part.optimized() for part in self.parts.values()]
        return groups[0] | {"critic": nn.ModuleList(group["critic"] for group in groups)}

    def policies(self):
        """Return {name: module} of the one actor."""
        return self.first.policies()

    def compile_parts(self):
        """Compile what the parts compile."""
        for part in self.parts.values():
            part.compile_parts()

    def initial(self, count, device):
        """Return the carry of the first part, which acts."""
        return self.first.initial(count, device)

    def act(self, world, state, carry, mode):
        """Choose actions (N, A) by the one actor."""
        return self.first.act(world, state, carry, mode)

    def rollout(self, world, states):
        """Imagine by the one actor."""
        return self.first.rollout(world, states)

    def losses(self, world, rollout, batch, rewards):
        """Return the actor's loss, the sum of the critics' losses, and {name of a reward: what the part found}."""
        losses, outs = {}, {}
        for name, part in self.parts.items():
            losses[name], outs[name] = part.losses(world, rollout, batch, rewards.unweighed(name))
        policy = sum(scale * losses[name]["policy"] for name, scale in self.scales.items())
        return {"policy": policy, "value": sum(loss["value"] for loss in losses.values())}, outs

    def replay_losses(self, world, states, batch, outs):
        """Return the sum of the critics' losses on the replayed rewards, each on its own."""
        own = {name: {**batch, "reward": batch["rewards"][name]} for name in self.parts}
        losses = [part.replay_losses(world, states, own[name], outs[name]) for name, part in self.parts.items()]
        return {name: sum(loss[name] for loss in losses) for name in losses[0]}

    def metrics(self, outs):
        """Return the first part's metrics, and of the others what is about returns, by names that end in theirs."""
        (first, *_), found = outs, {name: part.metrics(outs[name]) for name, part in self.parts.items()}
        kept = ("imag_return", "imag_value", "return_scale", "adv_mag")
        return found[first] | {f"{key}_{name}": found[name][key] for name in list(found)[1:] for key in kept}

    def improve(self, rollout, outs):
        """Let every part do what follows the gradient step; return the first one's metrics."""
        first, *_ = [part.improve(rollout, outs[name]) for name, part in self.parts.items()]
        return first
