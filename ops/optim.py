"""LaProp with adaptive gradient clipping and warm-up, on one flat buffer, without a host sync; and three Adams."""

import re

import torch

# Gradients this small count as none: where the CPU flushes their squares to zero, eps alone would be left to divide by,
# and they would make steps a hundred times as large as all others.
TINY = 1e-17


class LaProp:
    """The optimizer of DreamerV3: AGC per tensor, then RMS normalisation, then momentum (arXiv:2002.04839).

    The parameters and their gradients become views of two flat buffers, so that an update is a handful of
    kernels whatever the number of tensors; step counter and learning rate are tensors, so that it can be captured.

    Args:
      named_parameters: iterable of (name, parameter).
      lr: learning rate, reached linearly over the first `warmup` updates (the first update has lr 0).
      agc: a gradient's norm is clipped to agc * max(1e-3, parameter norm), per tensor; 0 turns it off.
      beta1, beta2, eps: decay of the momentum and of the second moment, and the denominator's floor.
      decay: decoupled weight decay of the parameters whose name matches the expression `decay_names`.
      anneal: length in updates of a linear decay to lr / 10 that ends there; 0 for a constant rate.
    """

    def __init__(
        self,
        named_parameters,
        lr=4e-5,
        agc=0.3,
        beta1=0.9,
        beta2=0.999,
        eps=1e-20,
        warmup=1000,
        decay=0.0,
        decay_names=r"(weight|kernel)$",
        anneal=0,
    ):
        named_parameters = list(named_parameters)
        self.names = [name for name, _ in named_parameters]
        self.params = [param for _, param in named_parameters]
        self.lr, self.agc, self.warmup, self.anneal = lr, agc, warmup, anneal
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        device = self.params[0].device
        sizes = [param.numel() for param in self.params]
        self.flat = torch.cat([param.detach().reshape(-1).float() for param in self.params])
        self.grad = torch.zeros_like(self.flat)
        self.nu = torch.zeros_like(self.flat)
        self.mu = torch.zeros_like(self.flat)
        self.count = torch.zeros((), device=device)
        views = zip(self.params, self.flat.split(sizes), self.grad.split(sizes), strict=True)
        for param, value, grad in views:
            param.data = value.view_as(param)
            param.grad = grad.view_as(param)
        self.decayed = [p for n, p in named_parameters if decay and re.search(decay_names, n)]
        self.decay = decay

    def zero_grad(self):
        """Set all gradients to zero, in place: they stay views of the flat buffer."""
        self.grad.zero_()

    def learning_rate(self):
        """The rate of the next update: a 0-d tensor."""
        rate = torch.full_like(self.count, self.lr)
        if self.anneal:
            done = ((self.count - self.warmup) / (self.anneal - self.warmup)).clamp(0, 1)
            rate = rate * (1 - 0.9 * done)
        if self.warmup:
            rate = rate * (self.count / self.warmup).clamp(max=1)
        return rate

    @torch.no_grad()
    def step(self):
        """One update from the gradients in place. Returns metrics as 0-d tensors."""
        grads = [param.grad for param in self.params]
        norms = torch.stack(torch._foreach_norm(grads))
        rate = self.learning_rate()
        if self.agc:
            limits = self.agc * torch.stack(torch._foreach_norm(self.params)).clamp(min=1e-3)
            torch._foreach_mul_(grads, list((limits / norms.clamp(min=1e-30)).clamp(max=1).unbind()))
        self.count += 1
        grad = torch.nn.functional.hardshrink(self.grad, TINY)
        self.nu.mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        unbias = 1 - self.beta2**self.count
        scaled = grad / (self.nu / unbias).sqrt_().add_(self.eps)
        self.mu.lerp_(scaled, 1 - self.beta1)
        if self.decayed:
            torch._foreach_mul_(self.decayed, 1 - rate * self.decay)
        self.flat.addcmul_(self.mu, -rate / (1 - self.beta1**self.count))
        return {"grad_norm": norms.square().sum().sqrt(), "lr": rate}

    def state_dict(self):
        return {"names": self.names, "nu": self.nu, "mu": self.mu, "count": self.count}

    def load_state_dict(self, state):
        """Raises ValueError if the state belongs to other parameters."""
        if state.get("names") != self.names or state["nu"].shape != self.nu.shape:
            raise ValueError("the optimizer state belongs to other parameters")
        for name in ("nu", "mu", "count"):
            getattr(self, name).copy_(state[name])


class Adams:
    """The optimizers of the older forms: an Adam each for the world model, for every actor and for every critic.

    Each clips the global norm of its gradients. Weight decay multiplies by 1 - decay, whatever the learning rate, as
    DreamerV2 has it.

    Args:
      named_parameters: iterable of (name, parameter).
      config: with model_opt, actor_opt, critic_opt, each with lr, eps, clip, decay.
    """

    def __init__(self, named_parameters, config):
        groups = {}
        for name, param in named_parameters:
            groups.setdefault(group_of(name), {})[name] = param
        self.names = {group: list(params) for group, params in groups.items()}
        self.params = {group: list(params.values()) for group, params in groups.items()}
        settings = {"actor": config.actor_opt, "critic": config.critic_opt}
        self.settings = {group: settings.get(group.split("_")[-1], config.model_opt) for group in groups}
        self.adams = {
            group: torch.optim.AdamW(
                self.params[group],
                lr=s.lr,
                eps=s.eps,
                weight_decay=s.decay / s.lr if s.lr else 0.0,
                capturable=self.params[group][0].is_cuda,
            )
            for group, s in self.settings.items()
        }

    def zero_grad(self):
        """Forget all gradients."""
        for adam in self.adams.values():
            adam.zero_grad()

    def step(self):
        """One update from the gradients in place. Returns metrics as 0-d tensors."""
        metrics = {}
        for group, adam in self.adams.items():
            norm = torch.nn.utils.clip_grad_norm_(self.params[group], self.settings[group].clip)
            metrics[f"{group}_grad_norm"] = norm
            adam.step()
        return metrics

    def state_dict(self):
        return {"names": self.names, "adams": {group: adam.state_dict()["state"] for group, adam in self.adams.items()}}

    def load_state_dict(self, state):
        """Raises ValueError if the state belongs to other parameters."""
        if state.get("names") != self.names:
            raise ValueError("the optimizer state belongs to other parameters")
        for group, adam in self.adams.items():  # its settings stay those of this run's configuration
            adam.load_state_dict({**adam.state_dict(), "state": state["adams"][group]})


def group_of(name):
    """Which Adam a parameter belongs to: model, actor or critic, or the explorer's expl_model and so on."""
    parts = name.split(".")
    kind = next((part for part in parts if part in ("actor", "critic")), "model")
    return f"expl_{kind}" if parts[0] == "explorer" else kind
