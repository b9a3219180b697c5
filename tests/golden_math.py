"""Compare small pieces of mathematics with recorded numbers: part of `python -m tests.golden`."""

import ast
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import models
import ops.distributions as dists
import rssm
from ops import layers, normals
from ops.math import lambda_return, symexp, symlog
from ops.optim import LaProp


def compare_math(path):
    """Yield (group, name, relative error) for every result in the file."""
    with np.load(path) as file:
        data = {key: torch.as_tensor(np.array(file[key])) for key in file.files if file[key].dtype.kind != "U"}
        texts = {key: str(file[key]) for key in file.files if file[key].dtype.kind == "U"}
    for function in (elementwise, twohot, returns, normalizers, percentile, binary, categorical, kl_balance):
        yield from function(data)
    yield from bounded_normal(data)
    yield from slow_critic(data)
    yield from optimizer(data, texts)
    yield from layer_results(data)
    yield from initial_values(data)


def error(ours, theirs):
    from tests.golden import error

    return error(ours, theirs)


def leaf(value):
    return value.clone().requires_grad_()


def elementwise(data):
    for name, function in {"symlog": symlog, "symexp": symexp, "silu": F.silu}.items():
        yield name, "y", error(function(data[f"{name}/x"]), data[f"{name}/y"])


def twohot(data):
    target = data["twohot/target"]
    for kind in ("rand", "sharp", "uniform"):
        logits = leaf(data[f"twohot/{kind}/logits"])
        dist = dists.TwoHot(logits, dists.symexp_bins(255))
        loss = -dist.log_prob(target)
        loss.sum().backward()
        yield "twohot", f"{kind} loss", error(loss, data[f"twohot/{kind}/loss"])
        yield "twohot", f"{kind} grad", error(logits.grad, data[f"twohot/{kind}/grad_logits"])
        double = dists.TwoHot(data[f"twohot/{kind}/logits"], data["twohot/bins255"].double())
        double.logits = data[f"twohot/{kind}/logits"].double().log_softmax(-1)
        yield "twohot", f"{kind} pred in float64", error(double.mode(), data[f"twohot/{kind}/pred_f64"])
        if kind != "rand":  # where the sum cancels over nine orders of magnitude, float32 has no digits to compare
            yield "twohot", f"{kind} pred", error(dist.mode(), data[f"twohot/{kind}/pred"])
    for count in (255, 5, 4):
        if count == 255:
            yield "twohot", "bins255", error(dists.symexp_bins(255), data["twohot/bins255"])
            continue
        dist = dists.TwoHot(data[f"twohot/bins{count}_logits"], data[f"twohot/bins{count}"])
        loss = -dist.log_prob(data[f"twohot/bins{count}_target"])
        yield "twohot", f"bins{count} loss", error(loss, data[f"twohot/bins{count}_loss"])
        yield "twohot", f"bins{count} pred", error(dist.mode(), data[f"twohot/bins{count}_pred"])


RETURN_INPUTS = ("last", "term", "rew", "boot", "disc", "lam")


def returns(data):
    cases = sorted({key.split("/")[1] for key in data if key.startswith("lambda_return/")})
    for case in cases:
        get = {
            key: data[f"lambda_return/{case}/{key}"] for key in ("last", "term", "rew", "boot", "disc", "lam", "ret")
        }
        ret = lambda_return(get["last"], get["term"], get["rew"], get["boot"], get["disc"], get["lam"])
        yield "lambda_return", case, error(ret, get["ret"])


class DebiasedNorm(models.ReturnNorm):
    """Divide the averages by the weight that real batches have in them. Args: as for ReturnNorm."""

    def __init__(self, *args):
        super().__init__(*args)
        self.weight = torch.zeros(())

    def forward(self, returns):
        super().forward(returns)
        self.weight.lerp_(torch.ones(()), self.rate)
        low, high = self.range / self.weight
        return low, (high - low).clamp(min=self.limit)


class MomentNorm:
    """Mean and standard deviation of a signal, averaged over batches without bias.

    Args:
      rate: share of the new batch; limit: least scale.
    """

    def __init__(self, rate, limit):
        self.rate, self.limit = rate, limit
        self.moments, self.weight = torch.zeros(2), torch.zeros(())

    def __call__(self, x):
        """Fold in a batch of any shape; return (offset, scale), 0-d."""
        self.moments.lerp_(torch.stack([x.mean(), x.square().mean()]), self.rate)
        self.weight.lerp_(torch.ones(()), self.rate)
        mean, square = self.moments / self.weight
        return mean, (square - mean.square()).clamp(min=0).sqrt().clamp(min=self.limit)


def normalizers(data):
    rates = {"perc": (0.01, 1.0, False), "perc_small": (0.01, 1.0, False), "perc_fast": (0.3, 1.0, False)}
    for name, (rate, limit, debias) in {**rates, "perc_debias": (0.01, 1e-8, True)}.items():
        norm = (DebiasedNorm if debias else models.ReturnNorm)(rate, limit, 5.0, 95.0)
        rows = []
        for x in data[f"normalize/{name}/x"]:
            offset, scale = norm(x)
            rows.append(torch.stack([*norm.range, *([norm.weight] if debias else []), offset, scale]))
        yield "normalize", name, error(torch.stack(rows), data[f"normalize/{name}/rows"])
    norm, rows = MomentNorm(0.01, 1e-8), []
    for x in data["normalize/meanstd/x"]:
        offset, scale = norm(x)
        rows.append(torch.stack([*norm.moments, norm.weight, offset, scale]))
    yield "normalize", "meanstd", error(torch.stack(rows), data["normalize/meanstd/rows"])


def percentile(data):
    quantiles = data["percentile/q"].float()
    quantiles = quantiles / 100 if quantiles.max() > 1 else quantiles
    yield "percentile", "y", error(torch.quantile(data["percentile/x"], quantiles), data["percentile/y"])


def binary(data):
    logit = leaf(data["binary/logit"])
    dist = dists.Bernoulli(logit[..., None])
    loss = -dist.log_prob(data["binary/target"])
    loss.sum().backward()
    yield "binary", "loss", error(loss, data["binary/loss"])
    yield "binary", "prob1", error(dist.mean(), data["binary/prob1"])
    yield "binary", "pred", error(dist.mode(), data["binary/pred"].float())
    yield "binary", "grad", error(logit.grad, data["binary/grad_logit"])


def categorical(data):
    index = F.one_hot(data["categorical/index"].long(), data["categorical/a"].shape[-1]).float()
    for kind, unimix in {"unimix": 0.01, "plain": 0.0}.items():
        a, b = leaf(data["categorical/a"]), leaf(data["categorical/b"])
        get = {key.split("/")[-1]: data[key] for key in data if key.startswith(f"categorical/{kind}/")}
        ours, other = dists.OneHot(a, unimix), dists.OneHot(b, unimix)
        results = {
            "probs": ours.probs, "logprobs": ours.logits, "entropy": ours.entropy(), "kl_ab": ours.kl(other),
            "logp": ours.log_prob(index),
        }  # fmt: skip
        for name, value in results.items():
            yield "categorical", f"{kind} {name}", error(value, get[name])
        grads = dict(zip(("kl_grad_a", "kl_grad_b"), torch.autograd.grad(ours.kl(other).sum(), (a, b)), strict=True))
        (grads["entropy_grad"],) = torch.autograd.grad(dists.OneHot(a, unimix).entropy().sum(), a)
        (grads["logp_grad"],) = torch.autograd.grad(dists.OneHot(a, unimix).log_prob(index).sum(), a)
        for name, value in grads.items():
            yield "categorical", f"{kind} {name}", error(value, get[name])
    a = leaf(data["categorical/a"])
    sample = dists.OneHot(a, 0.01).straight_through(data["categorical/index"])
    (sample * data["categorical/cotangent"]).sum().backward()
    yield "categorical", "straight-through value", error(sample, data["categorical/straight_through/value"])
    yield "categorical", "straight-through grad", error(a.grad, data["categorical/straight_through/grad"])


def kl_balance(data):
    post, prior = leaf(data["kl_balance/post"]), leaf(data["kl_balance/prior"])
    latent = rssm.OneHotLatent(*post.shape[-2:], 0.01)
    dyn, rep, _ = models.kl_losses(latent, latent.dist(post.flatten(-2)), latent.dist(prior.flatten(-2)), 1.0)
    (dyn + 0.1 * rep).sum().backward()
    results = {"dyn": dyn, "rep": rep, "grad_post": post.grad, "grad_prior": prior.grad}
    for name, value in results.items():
        yield "kl_balance", name, error(value, data[f"kl_balance/{name}"])


def bounded_normal(data):
    get = {key.split("/")[-1]: data[key] for key in data if key.startswith("bounded_normal/")}
    mean, stddev = leaf(get["raw_mean"]), leaf(get["raw_stddev"])
    dist = normals.BoundedNormal(mean, stddev, float(get["minstd"]), float(get["maxstd"]))
    logp, entropy = dist.log_prob(get["action"]), dist.entropy()
    (logp + 0.3 * entropy).sum().backward()
    results = {
        "mean": dist.mean, "stddev": dist.stddev, "logp": logp, "entropy": entropy, "grad_mean": mean.grad,
        "grad_stddev": stddev.grad,
    }  # fmt: skip
    for name, value in results.items():
        yield "bounded_normal", name, error(value, get[name])


def slow_critic(data):
    """Yield results of the moving average alone, on a behavior whose critics are one tensor each."""
    for name, every in {"every1": 1, "every2": 2}.items():
        behavior = models.ImagBehavior.__new__(models.ImagBehavior)
        nn.Module.__init__(behavior)
        behavior.critic, behavior.slow = nn.Module(), nn.Module()
        behavior.critic.value = nn.Parameter(torch.zeros_like(data[f"slow/{name}/initial"]))
        behavior.slow.value = nn.Parameter(data[f"slow/{name}/initial"].clone(), requires_grad=False)
        behavior.slow_rate, behavior.slow_every = 0.02, every
        behavior.updates = torch.zeros((), dtype=torch.int64)
        results = []
        for source in data[f"slow/{name}/source"]:
            behavior.critic.value.data.copy_(source)
            behavior.improve(None)
            results.append(behavior.slow.value.clone())
        yield "slow", name, error(torch.stack(results), data[f"slow/{name}/result"])


class ScheduledLaProp(LaProp):
    """LaProp with weight decay and a decreasing rate.

    Args:
      decay: decoupled weight decay of the parameters whose name matches the expression `decay_names`.
      anneal: length in updates of a linear decay to lr / 10 that ends there; 0 for a constant rate.
      params, options: as for LaProp.
    """

    def __init__(self, params, decay=0.0, decay_names=r"(weight|kernel)$", anneal=0, **options):
        super().__init__(params, **options)
        self.decay, self.anneal = decay, anneal
        self.decayed = [param for name, param in params.items() if re.search(decay_names, name)]

    def learning_rate(self):
        rate = super().learning_rate()
        if not self.anneal:
            return rate
        return rate * (1 - 0.9 * ((self.count - self.warmup) / (self.anneal - self.warmup)).clamp(0, 1))

    @torch.no_grad()
    def step(self):
        before = [param.clone() for param in self.decayed]
        metrics = super().step()
        for param, value in zip(self.decayed, before, strict=True):
            param.sub_(metrics["lr"] * self.decay * value)
        return metrics


def make_optimizer(data, hparams):
    params = {name: nn.Parameter(data[f"optim/initial/{name}"].clone()) for name in ("matrix", "vector", "conv")}
    names = {"wd": "decay", "wdregex": "decay_names"}
    options = {names.get(key, key): value for key, value in hparams.items() if key != "schedule"}
    return params, ScheduledLaProp(params, **{"warmup": 0, **options})


def optimizer(data, texts):
    for case in ("warmup4", "const", "warmup1000", "linear", "wd", "noagc"):
        params, opt = make_optimizer(data, ast.literal_eval(texts[f"optim/{case}/hparams"]))
        results, rates = {name: [] for name in params}, []
        for step in range(6):
            for name, param in params.items():
                param.grad.copy_(data[f"optim/grads/{name}"][step])
            rates.append(opt.step()["lr"])
            for name, param in params.items():
                results[name].append(param.detach().clone())
        for name, values in results.items():
            yield "optim", f"{case} {name}", error(torch.stack(values), data[f"optim/{case}/{name}"])
        if case == "warmup4":
            yield "optim", "warmup4 lr", error(torch.stack(rates), data["optim/warmup4/lr"])
            sizes = [param.numel() for param in params.values()]
            for kind, flat in {"nu": opt.nu, "mu": opt.mu}.items():
                for name, value in zip(params, flat.split(sizes), strict=True):
                    yield "optim", f"final_{kind} {name}", error(value, data[f"optim/warmup4/final_{kind}/{name}"])
    params, opt = make_optimizer(data, {"lr": 1e-3})
    for name, param in params.items():
        param.grad.copy_(data[f"optim/grads/{name}"][1])
    opt.step()
    for name, param in params.items():
        yield "optim", f"agc {name}", error(param.grad, data[f"optim/agc_only_step1/{name}"])
    opt = LaProp({"x": nn.Parameter(torch.zeros(1))})
    rates = []
    for count in data["optim/lr_default/count"]:
        opt.count.fill_(count)
        rates.append(opt.learning_rate())
    yield "optim", "lr_default", error(torch.stack(rates), data["optim/lr_default/lr"])


def layer_results(data):
    builders = {
        "linear": lambda k: layers.Linear(k.shape[0], k.shape[1]),
        "linear_shape": lambda k: layers.Linear(k.shape[0], k.shape[1]),
        "blocklinear": lambda k: layers.BlockLinear(k.shape[0] * k.shape[1], k.shape[0] * k.shape[2], k.shape[0]),
        "conv5": lambda k: layers.Conv2d(k.shape[2], k.shape[3], 5),
        "conv5_stride2": lambda k: layers.Conv2d(k.shape[2], k.shape[3], 5, stride=2),
        "conv5_transp2": lambda k: layers.ConvTranspose2d(k.shape[2], k.shape[3], 5),
    }
    layouts = {
        "conv5": lambda k: k.permute(3, 2, 0, 1),
        "conv5_stride2": lambda k: k.permute(3, 2, 0, 1),
        "conv5_transp2": lambda k: k.permute(2, 3, 0, 1).flip(2, 3),
    }
    for name, build in builders.items():
        get = {key.split("/")[-1]: data[key] for key in data if key.startswith(f"layer/{name}/")}
        layer, layout = build(get["kernel"]), layouts.get(name, lambda k: k)
        kernel = layer.weight if "conv" in name else layer.kernel
        kernel.data.copy_(layout(get["kernel"]))
        layer.bias.data.copy_(get["bias"])
        x = leaf(get["x"])
        y = layer(x.unflatten(-1, (len(get["kernel"]), -1)) if name == "blocklinear" else x)
        y = y.reshape(get["y"].shape)
        (y * get["cotangent"]).sum().backward()
        yield "layer", f"{name} y", error(y, get["y"])
        yield "layer", f"{name} grad_x", error(x.grad, get["grad_x"])
        yield "layer", f"{name} grad_kernel", error(kernel.grad, layout(get["grad_kernel"]))
        yield "layer", f"{name} grad_bias", error(layer.bias.grad, get["grad_bias"])
    norm = layers.RMSNorm(len(data["layer/rms/scale"]))
    norm.scale.data.copy_(data["layer/rms/scale"])
    x = leaf(data["layer/rms/x"])
    y = norm(x)
    (y * data["layer/rms/cotangent"]).sum().backward()
    for name, value in {"y": y, "grad_x": x.grad, "grad_scale": norm.scale.grad}.items():
        yield "layer", f"rms {name}", error(value, data[f"layer/rms/{name}"])
    x = leaf(data["maxpool/x"])
    y = layers.MaxPool.apply(x)
    (y * data["maxpool/cotangent"]).sum().backward()
    yield "maxpool", "y", error(y, data["maxpool/y"])
    yield "maxpool", "grad_x", error(x.grad, data["maxpool/grad_x"])


def initial_values(data):
    """Compare our initial values with the measured spread; only a sampling error of the difference is allowed."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    shapes = {name: data[f"init/{name}/kernel_shape"].tolist() for name in ("linear", "blocklinear", "conv")}
    i, o = data["init/linear_outscale001/kernel_shape"].tolist()
    kernels = {
        "linear": layers.Linear(*shapes["linear"]).kernel,
        "blocklinear": layers.BlockLinear(
            shapes["blocklinear"][0] * shapes["blocklinear"][1],
            shapes["blocklinear"][0] * shapes["blocklinear"][2],
            shapes["blocklinear"][0],
        ).kernel,
        "conv": layers.Conv2d(*shapes["conv"][2:], shapes["conv"][0]).weight,
        "linear_outscale001": layers.Linear(i, o, 0.01).kernel,
    }
    torch.set_rng_state(generator_state)
    for name, kernel in kernels.items():
        theirs = data[f"init/{name}/std"]
        sampling = 4 * (2 * kernel.numel()) ** -0.5 * 2**0.5
        excess = max(0.0, error(kernel.std(), theirs) - sampling)
        yield "init", f"{name} std beyond sampling error", excess
        fan = {"linear": 400, "blocklinear": 1024, "conv": 1600, "linear_outscale001": 400}[name]
        bound = 2 * 1.1368 * (0.01 if name == "linear_outscale001" else 1.0) / fan**0.5
        yield "init", f"{name} beyond the cut", max(0.0, float(kernel.detach().abs().max()) / bound - 1)
