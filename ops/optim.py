"""LaProp with adaptive gradient clipping and warm-up, on one flat buffer, without a host sync; and several Adams, in
PyTorch's form and in TensorFlow's, and in one that a behavior can own."""

import torch
import torch.nn as nn

from ops.collectives import average_

# Treat smaller gradients as zero: with denormals flushed on the CPU, their squares underflow and g / eps explodes.
TINY = 1e-17


def repeats(device):
    """Return True if to repeat a factor for each number takes less time there than a kernel for each factor."""
    return device.type == "cuda"


class LaProp:
    """Optimizer of DreamerV3: AGC per tensor, then RMS normalization, then momentum (arXiv:2002.04839).

    The parameters and their gradients become views of two flat buffers, so that an update is a handful of
    kernels however many tensors there are; step counter and learning rate are tensors, so that it can be captured.

    Args:
      params: {name: parameter}.
      lr: learning rate, reached linearly over the first `warmup` updates (the first update has lr 0).
      agc: a gradient's norm is clipped to agc * max(1e-3, parameter norm), per tensor; 0 turns it off.
      beta1, beta2, eps: decay of the momentum and of the second moment, and the denominator's floor.
    """

    def __init__(self, params, lr=4e-5, agc=0.3, beta1=0.9, beta2=0.999, eps=1e-20, warmup=1000):
        self.names, self.params = list(params), list(params.values())
        self.lr, self.agc, self.warmup = lr, agc, warmup
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.flat = torch.cat([param.detach().reshape(-1).float() for param in self.params])
        self.grad, self.nu, self.mu = (torch.zeros_like(self.flat) for _ in range(3))
        self.count = torch.zeros((), device=self.flat.device)
        self.sizes = torch.tensor([param.numel() for param in self.params], device=self.flat.device)
        for param, value, grad in zip(self.params, self.views(self.flat), self.views(self.grad), strict=True):
            param.data, param.grad = value, grad

    def views(self, flat):
        """Split a flat buffer into views of the parameters' shapes."""
        parts = flat.split([param.numel() for param in self.params])
        return [part.view_as(param) for part, param in zip(parts, self.params, strict=True)]

    def zero_grad(self):
        """Set all gradients to zero, in place: they stay views of the flat buffer."""
        self.grad.zero_()

    def learning_rate(self):
        """Return the rate of the next update: a 0-d tensor."""
        rate = torch.full_like(self.count, self.lr)
        return rate * (self.count / self.warmup).clamp(max=1) if self.warmup else rate

    def rate(self, name):
        """Return the rate of a parameter's next update: a 0-d tensor."""
        return self.learning_rate()

    @torch.no_grad()
    def step(self):
        """Update from the gradients in place; return metrics as 0-d tensors."""
        average_([self.grad])
        grads = [param.grad for param in self.params]
        norms = torch.stack(torch._foreach_norm(grads))
        rate = self.learning_rate()
        if self.agc:
            limits = self.agc * torch.stack(torch._foreach_norm(self.params)).clamp(min=1e-3)
            self.scale_gradients((limits / norms.clamp(min=1e-30)).clamp(max=1))
        self.count += 1
        grad = torch.nn.functional.hardshrink(self.grad, TINY)
        self.nu.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        unbias = 1 - self.beta2**self.count
        scaled = grad / (self.nu / unbias).sqrt_().add_(self.eps)
        self.mu.lerp_(scaled, 1 - self.beta1)
        self.flat.addcmul_(self.mu, -rate / (1 - self.beta1**self.count))
        return {"grad_norm": norms.square().sum().sqrt(), "lr": rate}

    def scale_gradients(self, factors):
        """Multiply the gradient of each parameter by its own factor, (number of parameters,), in place."""
        if repeats(factors.device):
            self.grad.mul_(torch.repeat_interleave(factors, self.sizes, output_size=len(self.grad)))
        else:
            torch._foreach_mul_([param.grad for param in self.params], list(factors.unbind()))

    def scales(self, names):
        """Return {name: what a gradient is multiplied by before momentum, in the parameter's shape}; 0 at first."""
        moments = dict(zip(self.names, self.views(self.nu), strict=True))
        rate, unbias = self.learning_rate() * (self.count > 0), (1 - self.beta2**self.count).clamp(min=self.eps)
        return {name: rate / ((moments[name] / unbias).sqrt() + self.eps) for name in names}

    def state_dict(self):
        """Return the counter and {name: {nu, mu}}."""
        pairs = zip(self.names, self.views(self.nu), self.views(self.mu), strict=True)
        moments = {name: {"nu": nu, "mu": mu} for name, nu, mu in pairs}
        return {"kind": "laprop", "count": self.count, "names": self.names, "moments": moments}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned. Raises ValueError if it belongs to other parameters."""
        check_state(state, "laprop", dict(zip(self.names, self.params, strict=True)))
        self.count.copy_(state["count"])
        for name, nu, mu in zip(self.names, self.views(self.nu), self.views(self.mu), strict=True):
            found = state["moments"].get(name, {"nu": torch.zeros_like(nu), "mu": torch.zeros_like(mu)})
            nu.copy_(found["nu"]), mu.copy_(found["mu"])


class Adams:
    """Optimizers of the older versions: one Adam for each group of parameters.

    Each clips the global norm of its gradients. Weight decay multiplies by 1 - decay, independent of the learning
    rate, as in DreamerV2.

    Args:
      groups: {group: {name: parameter}}.
      settings: {group: configuration with lr, eps, clip, decay}.
    """

    def __init__(self, groups, settings):
        self.groups, self.settings = groups, settings
        self.adams = {group: self.make(list(params.values()), settings[group]) for group, params in groups.items()}

    def make(self, params, settings):
        """Return the Adam of a group."""
        return torch.optim.AdamW(
            params,
            lr=settings.lr,
            eps=settings.eps,
            weight_decay=settings.decay / settings.lr if settings.lr else 0.0,
            capturable=params[0].is_cuda,
        )

    def rate(self, name):
        """Return the rate of a parameter's next update."""
        return next(self.settings[group].lr for group, params in self.groups.items() if name in params)

    def zero_grad(self):
        """Set all gradients to None."""
        for adam in self.adams.values():
            adam.zero_grad()

    def step(self):
        """Update from the gradients in place; return metrics as 0-d tensors."""
        average_([p.grad for params in self.groups.values() for p in params.values() if p.grad is not None])
        metrics = {}
        for group, adam in self.adams.items():
            norm = torch.nn.utils.clip_grad_norm_(self.groups[group].values(), self.settings[group].clip)
            metrics[f"{group}_grad_norm"] = norm
            adam.step()
        return metrics

    def scales(self, names):
        """Return {name: what a gradient is multiplied by before momentum, in the parameter's shape}; 0 at first."""
        found, beta2 = {}, 0.999  # of PyTorch and TensorFlow
        for group, params in self.groups.items():
            for name in params.keys() & {*names}:
                state, settings = self.adams[group].state.get(params[name]), self.settings[group]
                if state:
                    root = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt()
                found[name] = settings.lr / (root + settings.eps) if state else torch.zeros_like(params[name])
        return found

    def state_dict(self):
        """Return {name: Adam's moments of the parameter}, among others."""
        moments = {}
        for group, adam in self.adams.items():
            kept = adam.state_dict()["state"]
            moments |= {name: kept[i] for i, name in enumerate(self.groups[group]) if i in kept}
        names = [name for params in self.groups.values() for name in params]
        return {"kind": "adam", "names": names, "moments": moments}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned, except the rates. Raises ValueError if it belongs to other parameters."""
        check_state(state, "adam", {name: p for params in self.groups.values() for name, p in params.items()})
        for group, adam in self.adams.items():
            kept = {i: state["moments"].get(name) for i, name in enumerate(self.groups[group])}
            adam.load_state_dict({**adam.state_dict(), "state": {i: found for i, found in kept.items() if found}})


class TFAdam(torch.optim.Optimizer):
    """Adam as TensorFlow computes it (arXiv:1412.6980, the paragraph before section 2.1):

        p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps)

    The second moment v is not corrected before eps is added, so that this is PyTorch's Adam with eps / sqrt(1 -
    beta2^t): 32 times larger at the first step, and as large after some thousands. The counters t are tensors beside
    the parameters and nothing waits for the host, so that an update can be captured as a CUDA graph.

    Args:
      params: parameters; lr: learning rate; eps: floor of the denominator.
      decay: share that parameters lose in every update, whatever the learning rate (DreamerV2).
    """

    def __init__(self, params, lr, eps, decay=0.0, beta1=0.9, beta2=0.999):
        settings = {"lr": lr, "eps": eps, "decay": decay, "beta1": beta1, "beta2": beta2}
        super().__init__(params, {**settings, "capturable": True})  # a loaded counter goes to the parameter's device

    @torch.no_grad()
    def step(self):
        """Update from the gradients in place. A parameter without a gradient stays."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self.update(params, [param.grad for param in params], group)

    def update(self, params, grads, group):
        """Update parameters by their gradients; group: with lr, eps, decay, beta1, beta2."""
        for param in params:
            if not self.state[param]:
                self.state[param] = fresh(param)
        states = [self.state[param] for param in params]
        counts, means, squares = ([state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq"))
        torch._foreach_add_(counts, 1)
        torch._foreach_lerp_(means, grads, 1 - group["beta1"])
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["beta2"])
        count = torch.stack(counts)
        rates = group["lr"] * (1 - group["beta2"] ** count).sqrt() / (1 - group["beta1"] ** count)
        steps = torch._foreach_sqrt(squares)
        torch._foreach_add_(steps, group["eps"])
        torch._foreach_reciprocal_(steps)
        torch._foreach_mul_(steps, means)
        torch._foreach_mul_(steps, list(rates.unbind()))
        if group["decay"]:
            torch._foreach_mul_(params, 1 - group["decay"])
        torch._foreach_sub_(params, steps)


def fresh(param):
    """Return the state of a parameter before its first update, with the names of PyTorch's Adam."""
    moments = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=param.device), **moments}


class TFAdams(Adams):
    """Adams in TensorFlow's form, which PlaNet to DreamerV2 were trained with. Its state is that of `Adams`."""

    def make(self, params, settings):
        return TFAdam(params, settings.lr, settings.eps, settings.decay)


class OwnAdam(nn.Module):
    """Adam of a module that learns by itself: its moments are buffers, saved with that module; a step can be masked.

    Nothing waits for the host, so that a fixed number of steps can be captured as a CUDA graph, however many count.

    Args:
      params: parameters, all of which have a gradient; lr, eps: learning rate, floor of the denominator.
      clip: greatest norm of the gradient; beta1, beta2: decay of the moments.
      learned: (rate, limit, start) of a factor of lr that learns as `rates.LearnedRates` says; None for none.
    """

    def __init__(self, params, lr, eps=1e-5, clip=0.5, beta1=0.9, beta2=0.999, learned=None):
        super().__init__()
        self.params, self.learned = list(params), learned
        self.lr, self.eps, self.clip, self.beta1, self.beta2 = lr, eps, clip, beta1, beta2
        size = sum(param.numel() for param in self.params)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.zeros(size))
        if learned:
            self.register_buffer("factor", torch.tensor(float(learned[2])))
            self.register_buffer("last", torch.zeros(size))

    def step(self, loss, going=None):
        """Take a step down a 0-d loss, in place; none if `going`, a 0-d bool tensor, is false.

        Returns: the norm of the gradient, 0-d.
        """
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            grad = torch.cat([part.reshape(-1).float() for part in grads])
            average_([grad])
            norm = torch.linalg.vector_norm(grad)
            going = torch.ones_like(norm, dtype=torch.bool) if self.learned and going is None else going
            factor = self.moved_factor(grad, norm) if self.learned else None
            grad = grad * (self.clip / norm.clamp(min=1e-6)).clamp(max=1)
            count = self.count + 1
            mean = torch.lerp(self.mean, grad, 1 - self.beta1)
            square = torch.lerp(self.square, grad.square(), 1 - self.beta2)
            unbiased = square / (1 - self.beta2**count)
            step = -self.lr / (1 - self.beta1**count) * mean / (unbiased.sqrt() + self.eps)
            if going is not None:
                count, mean, square = (
                    torch.where(going, new, old)
                    for new, old in ((count, self.count), (mean, self.mean), (square, self.square))
                )
                step = torch.where(going, step, 0.0)
            if self.learned:
                self.factor.copy_(torch.where(going, factor, self.factor))
                self.last.copy_(torch.where(going, step, self.last))
                step = self.factor * step
            self.count.copy_(count), self.mean.copy_(mean), self.square.copy_(square)
            parts = step.split([param.numel() for param in self.params])
            torch._foreach_add_(self.params, [p.view_as(param) for p, param in zip(parts, self.params, strict=True)])
        return norm

    def moved_factor(self, grad, norm):
        """Return the factor of lr as it is after a gradient (n,) of a norm, 0-d."""
        rate, limit, _ = self.learned
        cosine = (grad @ self.last) / (norm * torch.linalg.vector_norm(self.last)).clamp(min=1e-30)
        return (self.factor * (1 - rate * cosine)).clamp(1 / limit, limit)

    def scales(self):
        """Return what the gradient of each parameter is multiplied by before momentum; 0 at first."""
        lr = self.lr * self.factor if self.learned else self.lr
        unbiased = self.square / (1 - self.beta2**self.count).clamp(min=1e-12)
        flat = (self.count > 0) * lr / (unbiased.sqrt() + self.eps)
        parts = flat.split([param.numel() for param in self.params])
        return [part.view_as(param) for part, param in zip(parts, self.params, strict=True)]


def check_state(state, kind, params):
    """Raise ValueError unless a state fits the kind of optimizer and the parameters; it may lack biases.

    params: {name: parameter}.
    """
    kept, missing = state["moments"], {name for name in params.keys() - {*state["names"]} if not name.endswith(".bias")}
    other = [
        name
        for name, param in params.items()
        for key, moment in kept.get(name, {}).items()
        if moment.shape != (param.shape if key != "step" else ())
    ]
    if state["kind"] != kind or missing or {*state["names"]} - params.keys() or other:
        raise ValueError("the optimizer state belongs to other parameters")
