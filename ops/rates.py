"""Learning rates that learn: a factor for each group of parameters, moved by its hypergradient (arXiv:1703.04782)."""

import torch

from ops.collectives import average_


class LearnedRates:
    """An optimizer whose rates have factors that grow where a gradient agrees with the step before it, else shrink.

    A step moves the parameters of a group by d_t = f_t s_t, where s_t is what the optimizer alone would do. The loss
    of the next batch has the derivative g_{t+1} . s_t in f_t, exactly and for any optimizer. Its scale says little, so
    that only the angle counts (the multiplicative rule of section 3.1 there):

        f_{t+1} = f_t (1 - rate cos(g_{t+1}, s_t))

    Args:
      opt: LaProp or Adams, which updates the parameters in place.
      groups: {group: {name: parameter}} of those with a factor, from where `opt` has them.
      rate: of the factors, which begin at `start`; limit: they stay between 1 / limit and limit.
    """

    def __init__(self, opt, groups, rate, limit, start=1.0):
        self.opt, self.rate, self.limit = opt, rate, limit
        self.groups = {group: list(params.values()) for group, params in groups.items()}
        self.names = {group: list(params) for group, params in groups.items()}
        self.steps = {group: [torch.zeros_like(param) for param in params] for group, params in self.groups.items()}
        device = next(param.device for params in self.groups.values() for param in params)
        self.factors = {group: torch.full((), start, device=device) for group in groups}
        self.zero_grad = opt.zero_grad

    @torch.no_grad()
    def step(self):
        """Move the factors by the gradients in place, then the parameters; return metrics as 0-d tensors."""
        metrics = {}
        average_([param.grad for params in self.groups.values() for param in params if param.grad is not None])
        for group, params in self.groups.items():
            cosine = self.cosine(group)
            self.factors[group].mul_(1 - self.rate * cosine).clamp_(1 / self.limit, self.limit)
            torch._foreach_copy_(self.steps[group], params)
            rate = self.factors[group] * self.opt.rate(self.names[group][0])
            metrics |= {f"meta/{group}_lr": rate, f"meta/{group}_factor": self.factors[group].clone()}
            metrics |= {f"meta/{group}_agreement": -cosine}
        metrics |= self.opt.step()
        for group, params in self.groups.items():
            before, step = self.steps[group], torch._foreach_sub(params, self.steps[group])
            torch._foreach_copy_(params, torch._foreach_add(before, torch._foreach_mul(step, self.factors[group])))
            torch._foreach_copy_(before, step)
        return metrics

    def derivative(self, group):
        """Return the derivative of the loss, whose gradients are in place, in the last factor of a group: g . s."""
        return sum((grad * step).sum() for grad, step in zip(self.gradients(group), self.steps[group], strict=True))

    def cosine(self, group):
        """Return the cosine between the gradient of a group and its last step, 0 without either: a 0-d tensor."""
        pair = self.gradients(group), self.steps[group]
        norms = [torch.stack(torch._foreach_norm(tensors)).square().sum().sqrt() for tensors in pair]
        return self.derivative(group) / (norms[0] * norms[1]).clamp(min=1e-30)

    def gradients(self, group):
        """Return the gradients of a group; of a parameter that has none, zeros."""
        return [torch.zeros_like(param) if param.grad is None else param.grad for param in self.groups[group]]

    def scales(self, names):
        """Return {name: what a gradient is multiplied by before momentum, in the parameter's shape}; 0 at first."""
        factors = {name: self.factors[group] for group, inside in self.names.items() for name in inside}
        return {name: scale * factors.get(name, 1.0) for name, scale in self.opt.scales(names).items()}

    def state_dict(self):
        """Return what the optimizer saves, and {group: factor and {name: last step}} as `rates`."""
        rates = {
            group: {"factor": self.factors[group], "steps": dict(zip(self.names[group], steps, strict=True))}
            for group, steps in self.steps.items()
        }
        return {**self.opt.state_dict(), "rates": rates}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned; an optimizer alone has none, and they stay."""
        self.opt.load_state_dict(state)
        for group in self.groups.keys() & state.get("rates", {}).keys():
            saved = state["rates"][group]
            self.factors[group].copy_(saved["factor"])
            for name, step in zip(self.names[group], self.steps[group], strict=True):
                step.copy_(saved["steps"][name])
