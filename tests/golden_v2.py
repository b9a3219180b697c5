"""Compare with numbers of the authors' DreamerV2 (danijar/dreamerv2): whole agents, and the ensemble of Plan2Explore.

All gradients of an update come from one backward pass here, so that the updates are those that a file calls joint.
"""

import json
import re
from types import SimpleNamespace

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

from agents.dreamer import Dreamer
from explorers.plan2explore import Plan2Explore
from modalities import obs_spec
from modalities.image.space import Plain
from models import Rollout
from rssm import feature
from specs import act_spec
from tests.golden import error
from training.config import CONFIGS, load_config

PRESETS = {"atari": "dreamerv2_atari", "crafter": "dreamerv2_crafter"}  # theirs, which go behind dreamerv2 here
NORM = {"scale": "gamma", "bias": "beta"}
HEADS = {
    "world.reward": "reward", "world.cont": "discount",
    "behavior.actor": "actor", "behavior.critic": "critic", "behavior.slow": "slow",
}  # fmt: skip
LAYER = r"mlp\.(?P<index>\d+)\.(?P<last>kernel|bias)"
LAYER_NORM = r"mlp\.(?P<index>\d+)\.0\.(?P<norm>\w+)"
HEAD = f"(?P<head>{'|'.join(map(re.escape, HEADS))})"
# Names of parameters here -> there: {half} is the index of a layer, {last} the parameter's own name.
NAMES = [
    (rf"world\.encoder\.parts\.vector\.{LAYER}", "enc/dense{half}/{last}"),
    (rf"world\.encoder\.parts\.vector\.{LAYER_NORM}", "enc/densenorm{half}/{last}"),
    (r"world\.encoder\.parts\.image\.convs\.(?P<index>\d+)\.(?P<last>\w+)", "enc/conv{index}/{last}"),
    (r"world\.encoder\.parts\.image\.norms\.(?P<index>\d+)\.0\.(?P<norm>\w+)", "enc/convnorm{index}/{last}"),
    (r"world\.rssm\.cell\.hidden\.0\.(?P<last>\w+)", "rssm/img_in/{last}"),
    (r"world\.rssm\.cell\.hidden\.1\.0\.(?P<norm>\w+)", "rssm/img_in_norm/{last}"),
    (r"world\.rssm\.cell\.gru\.linear\.(?P<last>\w+)", "rssm/gru/linear/{last}"),
    (r"world\.rssm\.cell\.gru\.norm\.(?P<norm>\w+)", "rssm/gru/norm/{last}"),
    (r"world\.rssm\.prior\.0\.0\.(?P<last>\w+)", "rssm/img_out_0/{last}"),
    (r"world\.rssm\.prior\.0\.1\.0\.(?P<norm>\w+)", "rssm/img_out_norm_0/{last}"),
    (r"world\.rssm\.prior\.1\.(?P<last>\w+)", "rssm/img_dist_0/{last}"),
    (r"world\.rssm\.posterior\.0\.0\.(?P<last>\w+)", "rssm/obs_out/{last}"),
    (r"world\.rssm\.posterior\.0\.1\.0\.(?P<norm>\w+)", "rssm/obs_out_norm/{last}"),
    (r"world\.rssm\.posterior\.1\.(?P<last>\w+)", "rssm/obs_dist/{last}"),
    (rf"world\.decoder\.parts\.vector\.{LAYER}", "decoder/dense{half}/{last}"),
    (rf"world\.decoder\.parts\.vector\.{LAYER_NORM}", "decoder/densenorm{half}/{last}"),
    (r"world\.decoder\.parts\.vector\.outs\.(?P<index>\d+)\.(?P<last>\w+)", "decoder/dense_{key}/out/{last}"),
    (r"world\.decoder\.parts\.image\.linear\.(?P<last>\w+)", "decoder/convin/{last}"),
    (r"world\.decoder\.parts\.image\.convs\.(?P<index>\d+)\.(?P<last>\w+)", "decoder/conv{index}/{last}"),
    (r"world\.decoder\.parts\.image\.norms\.(?P<index>\d+)\.0\.(?P<norm>\w+)", "decoder/convnorm{index}/{last}"),
    (r"world\.decoder\.parts\.image\.out\.(?P<last>\w+)", "decoder/conv{end}/{last}"),
    (rf"{HEAD}\.{LAYER}", "{head}/dense{half}/{last}"),
    (rf"{HEAD}\.{LAYER_NORM}", "{head}/norm{half}/{last}"),
    (rf"{HEAD}\.out\.(?P<last>\w+)", "{head}/out/out/{last}"),
    (r"behavior\.actor\.heads\.0\.outs\.(mean|logits)\.(?P<last>\w+)", "actor/out/out/{last}"),
    (r"behavior\.actor\.heads\.0\.outs\.stddev\.(?P<last>\w+)", "actor/out/std/{last}"),
]


def accepts(keys):
    """True if a file with these keys is of DreamerV2."""
    return "head/slow_value" in keys or {"in/feat", "img/grad_feat"} <= keys


def compare(path):
    """Yield (group, name, relative error) for every recorded result of a file."""
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    if "in/feat" in data:
        yield from compare_ensemble(data)
        return
    golden = Golden(data)
    yield from compare_forward(golden)
    yield from compare_learning(golden)
    yield from compare_updates(golden)


# ---------------------------------------------------------------------------
# The agent of a file


class Golden:
    """The contents of a file, and the agent that is made from them."""

    def __init__(self, data):
        self.data, self.json = data, json.loads(str(data["config_json"]))
        config = self.json["config"]
        matched = {3: re.compile(config["encoder"]["cnn_keys"]), 1: re.compile(config["encoder"]["mlp_keys"])}
        shapes = {key: tuple(shape) for key, shape in self.json["obs_space"].items()}
        # In their order, in which they are joined there.
        self.shapes = {
            key: shape for key, shape in shapes.items() if (kind := matched.get(len(shape))) and kind.match(key)
        }
        spaces = {key: make_space(shape) for key, shape in sorted(self.shapes.items())}
        (width,), count = (self.json["act_space"]["action"][key] for key in ("shape", "n"))
        actions = {"action": Discrete(count) if count else Box(-1, 1, (width,), np.float32)}
        self.agent = Dreamer(obs_spec(spaces), act_spec(actions), make_config(self.json), torch.get_default_device())
        self.names = {name: self.translate(name) for name, _ in self.agent.nets.named_parameters()}
        known = {key.removeprefix("param/") for key in data if key.startswith("param/")}
        if missing := known ^ {*self.names.values()}:
            raise ValueError(f"parameters without a counterpart: {', '.join(sorted(missing))}")
        with torch.no_grad():
            for name, param in self.agent.nets.named_parameters():
                param.copy_(self.param("param", name))

    def __getitem__(self, key):
        return torch.as_tensor(np.array(self.data[key]))

    def check(self, group, key, ours):
        """Yield the comparison of a result with that of a key, if the file has it."""
        if key in self.data:
            yield group, key, error(ours, self[key]) if ours.shape == self[key].shape else float("inf")

    def translate(self, name):
        """Return the authors' name of one of our parameters."""
        match, target = next((m, t) for p, t in NAMES if (m := re.fullmatch(p, name)))
        found = match.groupdict()
        index = int(found.get("index") or 0)
        fields = {
            "half": index // 2, "index": index, "end": len(self.json["config"]["decoder"]["cnn_kernels"]) - 1,
            "last": NORM[found["norm"]] if "norm" in found else {"weight": "kernel"}.get(found["last"], found["last"]),
            "head": HEADS.get(found.get("head")),
        }  # fmt: skip
        if "{key}" in target:
            fields["key"] = list(self.agent.world.decoder.parts["vector"].observed)[index]
        return target.format(**fields)

    def param(self, prefix, name):
        """Return a tensor of theirs, by our name and in our layout."""
        value = self[f"{prefix}/{self.names[name]}"]
        if value.ndim == 4:
            value = value.permute(3, 2, 0, 1)
        rows = self.rows(name, len(value))
        if rows is not None:
            value = value[rows]
        if name == "world.encoder.parts.image.convs.0.weight":
            value = value[:, self.places(3)]
        if name.startswith("world.decoder.parts.image.out."):
            value = value[self.places(3)] if value.ndim == 1 else value[:, self.places(3)]
        return value

    def rows(self, name, count):
        """Return the order in which the rows of their kernel are those of ours; None for as they are."""
        first = re.fullmatch(rf"{HEAD}\.mlp\.0\.kernel", name) or name == "world.decoder.parts.image.linear.kernel"
        rssm = self.agent.world.rssm
        if first:
            return self.swap(rssm.latent.size, count)  # [stoch, deter] there, [deter, stoch] here
        if name == "world.encoder.parts.vector.mlp.0.kernel":
            return self.places(1)
        if name == "world.rssm.posterior.0.0.kernel":
            embed = rssm.deter + self.embedding()
            return torch.cat([torch.arange(rssm.deter), embed])
        return None

    def swap(self, size, count):
        """Return the order that puts the first `size` of `count` behind the others."""
        return torch.cat([torch.arange(size, count), torch.arange(size)])

    def embedding(self):
        """Return the order of their embedding in ours: [image, vector] there, [vector, image] here."""
        parts = self.agent.world.encoder.parts
        count = sum(part.size for part in parts.values())
        return self.swap(parts["image"].size, count) if len(parts) == 2 else torch.arange(count)

    def places(self, axes):
        """Return where the numbers of each key are in theirs, in our order; axes: 1 for vectors, 3 for images."""
        sizes = {key: shape[-1] for key, shape in self.shapes.items() if len(shape) == axes}
        ends = dict(zip(sizes, np.cumsum(list(sizes.values())), strict=True))
        return torch.cat([torch.arange(ends[key] - sizes[key], ends[key]) for key in sorted(sizes)])

    def batch(self, number):
        """Return a recorded batch; action[t] is the one that led to step t."""
        keys = [*self.shapes, "action", "reward", "is_first", "is_last", "is_terminal"]
        return {key: self[f"batch{number}/{key}"] for key in keys}

    def loss(self, number, prefix):
        """Return the agent's loss of a batch by recorded draws, whose names begin with a prefix."""
        batch = self.batch(number)
        agent, action = self.agent, self[f"{prefix}noise/imag_action"]
        post, prior = self[f"{prefix}noise/post"].transpose(0, 1), self[f"{prefix}noise/imag_stoch"]
        give(agent.world.rssm.latent, [post, prior])
        give(agent.behavior.actor, [action if action.ndim == 3 else action[..., None]])
        return agent.loss(batch, agent.world.rssm.initial(len(batch["reward"]), agent.device))


def give(source, draws):
    """Replace the noise of a latent or an actor by recorded draws, one for each call."""
    draws = iter(draws)

    def noise(shape, device=None):
        draw = next(draws)
        assert draw.shape[: len(shape)] == shape, f"recorded are {draw.shape}, asked for are {shape}"
        return draw

    source.noise = noise


def make_space(shape):
    """Return the Gymnasium space of an observation's shape."""
    return Plain(0, 255, shape, np.uint8) if len(shape) == 3 else Box(-np.inf, np.inf, shape, np.float32)


def make_config(j):
    """Return our configuration for a file's."""
    c = j["config"]
    check_known(j)
    balance = c["kl"]["balance"]
    norm = {"none": "none", "layer": "layer_bias"}[c["rssm"]["norm"]]
    values = {
        "norm": norm, "act": c["rssm"]["act"], "cnn_act": c["rssm"]["act"],
        "clip_rewards": {"identity": "none"}.get(c["clip_rewards"], c["clip_rewards"]),
        "rssm.deter": c["rssm"]["deter"], "rssm.hidden": c["rssm"]["hidden"], "rssm.stoch": c["rssm"]["stoch"],
        "rssm.classes": c["rssm"]["discrete"], "encoder.depth": c["encoder"]["cnn_depth"],
        "encoder.kernel": c["encoder"]["cnn_kernels"][0], "decoder.depth": c["decoder"]["cnn_depth"],
        "cont_head.use": c["pred_discount"], "free_nats": c["kl"]["free"],
        "kl_clip": "mean" if c["kl"]["free_avg"] and balance != 0.5 else "step",
        "loss_scales.reward": c["loss_scales"].get("reward", 1.0),
        "loss_scales.cont": c["loss_scales"].get("discount", 1.0),
        "loss_scales.dyn": balance * c["loss_scales"].get("kl", 1.0),
        "loss_scales.rep": (1 - balance) * c["loss_scales"].get("kl", 1.0),
        "imag_horizon": j["H"], "horizon": 1 / (1 - c["discount"]), "lam": c["discount_lambda"],
        "actor.grad": {"both": "mixed"}.get(c["actor_grad"], c["actor_grad"]), "actor.grad_mix": c["actor_grad_mix"],
        "actor.entropy": c["actor_ent"], "actor.min_std": c["actor"]["min_std"],
        "critic.slow_every": c["slow_target_update"],
    }  # fmt: skip
    for ours, theirs in {"reward_head": "reward_head", "cont_head": "discount_head"}.items():
        values |= {f"{ours}.{key}": c[theirs][key] for key in ("layers", "units")}
    for part in ("actor", "critic"):
        values |= {f"{part}.{key}": c[part][key] for key in ("layers", "units")}
    for part in ("encoder", "decoder"):
        values |= {f"{part}.layers": len(c[part]["mlp_layers"]), f"{part}.units": c[part]["mlp_layers"][0]}
    for opt in ("model_opt", "actor_opt", "critic_opt"):
        values |= {f"{opt}.{key}": c[opt][theirs] for key, theirs in OPT.items()}
    presets = [PRESETS[name] for name in j["presets"] if name in PRESETS]
    return load_config(["--configs", "dreamerv2", *presets], CONFIGS).replace(**values)


OPT = {"lr": "lr", "eps": "eps", "clip": "clip", "decay": "wd"}


def check_known(j):
    """Raise ValueError that names what a file requires and this project lacks."""
    c = j["config"]
    heads = ["decoder", "reward", *["discount"] * c["pred_discount"]]
    known = {
        "rssm.ensemble": 1, "kl.forward": False, "encoder.cnn_kernels": [4] * 4, "decoder.cnn_kernels": [5, 5, 6, 6],
        "decoder.mlp_keys": c["encoder"]["mlp_keys"], "decoder.cnn_keys": c["encoder"]["cnn_keys"],
        "reward_head.dist": "mse", "discount_head.dist": "binary", "critic.dist": "mse", "actor.dist": "auto",
        "slow_target": True, "slow_target_fraction": 1, "slow_baseline": True, "reward_norm.momentum": 1.0,
        "reward_norm.scale": 1.0, "model_opt.opt": "adam", "actor_opt.opt": "adam", "critic_opt.opt": "adam",
    }  # fmt: skip
    for part in ("encoder", "decoder", "reward_head", "discount_head", "actor", "critic"):
        known |= {f"{part}.act": c["rssm"]["act"], f"{part}.norm": c["rssm"]["norm"]}
    for part in ("encoder", "decoder"):
        widths = c[part]["mlp_layers"]
        known[f"{part}.mlp_layers"] = widths[:1] * len(widths)
    for name, value in known.items():
        section, _, key = name.rpartition(".")
        found = (c[section] if section else c).get(key, value)
        if found != value:
            raise ValueError(f"the file's {name} is {found}: only {value} is known here")
    if not c["rssm"]["discrete"] or {*heads} - {*c["grad_heads"]}:
        raise ValueError("the file's latents are not discrete, or a head passes no gradient: neither is known here")
    if {c["loss_scales"].get(key, 1.0) for key in j["obs_space"]} != {1.0}:
        raise ValueError("the file weighs observations: only 1 is known here")


# ---------------------------------------------------------------------------
# What is compared


@torch.no_grad()
def compare_forward(golden):
    """Compare the world model on the first batch, and actor and critic in its states."""
    agent, world = golden.agent, golden.agent.world
    batch = world.prepare(golden.batch(0))
    embed = world.encode(batch)
    yield "embedding", "wm/embed", error(embed, golden["wm/embed"][..., golden.embedding()])
    noise, start = golden["noise/post"].transpose(0, 1), world.rssm.initial(len(embed), golden.agent.device)
    states, post = world.rssm.observe(embed, batch["action"], batch["is_first"], start, noise)
    prior = world.rssm.predict(states.deter)
    yield from golden.check("latents", "wm/deter", states.deter)
    yield from golden.check("latents", "wm/stoch", states.stoch)
    yield from golden.check("latents", "wm/feat", theirs_of(states))
    for name, dist in {"post": post, "prior": prior}.items():
        yield from golden.check("latents", f"wm/{name}_logit", dist.raw)
        yield from golden.check("latents", f"wm/{name}_ent", dist.entropy().sum(-1))
    yield from golden.check("latents", "wm/kl", world.rssm.latent.kl(post, prior))

    feat = feature(states)
    for key, dist in world.decoder(states).items():
        offset = 0.5 if len(golden.shapes[key]) == 3 else 0.0
        yield from golden.check("heads", f"head/decoder/{key}", dist.mode() - offset)
        yield from golden.check("heads", f"like/{key}", dist.log_prob(batch[key]))
    yield from golden.check("heads", "head/reward", world.reward(feat).mode())
    yield from golden.check("heads", "like/reward", world.reward(feat).log_prob(batch["reward"]))
    if world.cont is not None:
        going = (1 - batch["is_terminal"].float()) * world.cont_target
        yield from golden.check("heads", "head/discount", world.cont(feat).mean())
        yield from golden.check("heads", "like/discount", world.cont(feat).log_prob(going))
    yield from golden.check("heads", "head/value", agent.behavior.critic(feat).mode())
    yield from golden.check("heads", "head/slow_value", agent.behavior.slow(feat).mode())
    policy = agent.behavior.actor(feat)
    (part,) = policy.parts
    yield from golden.check("heads", "head/policy_mode", policy.mode())
    yield from golden.check("heads", "head/policy_entropy", policy.entropy())
    if "head/policy_logits" in golden.data:
        yield from golden.check("heads", "head/policy_logits", torch.cat([p.raw for p in part.parts], -1))
    else:
        yield from golden.check("heads", "head/policy_loc", part.mean)
        yield from golden.check("heads", "head/policy_scale", part.stddev)


def theirs_of(states):
    """Return the features of states in their order: [stoch, deter]."""
    return torch.cat([states.stoch.flatten(-2), states.deter], -1)


def compare_learning(golden):
    """Compare imagination, every loss and every gradient, at the recorded parameters."""
    agent = golden.agent
    losses, _, outs = golden.loss(0, "")
    yield from compare_imagination(golden, outs)
    means, scales = {name: loss.mean() for name, loss in losses.items()}, agent.scales
    kl = (scales["dyn"] * means["dyn"] + scales["rep"] * means["rep"]) / (scales["dyn"] + scales["rep"])
    theirs = {key: means[key] for key in golden.shapes} | {"reward": means["reward"], "kl": kl}
    theirs |= {"discount": means["cont"]} if "cont" in means else {}
    theirs["model"] = sum(scales[name] * means[name] for name in outs["model"])
    for name, loss in (theirs | {"actor": means["policy"], "critic": means["value"]}).items():
        yield from golden.check("losses", f"loss/{name}", loss)

    for name, loss in theirs.items():
        yield from compare_gradients(golden, name, loss, "world.")
    yield from compare_gradients(golden, "actor", means["policy"], "behavior.actor.")
    yield from compare_gradients(golden, "critic", means["value"], "behavior.critic.")


def compare_gradients(golden, loss_name, loss, prefix):
    """Compare the gradients of a loss with respect to a part, by the names of theirs."""
    params = {
        name: p for name, p in golden.agent.nets.named_parameters() if p.requires_grad and name.startswith(prefix)
    }
    if loss_name not in ("model", "actor", "critic"):  # of a part of the sum: what it does not reach is not recorded
        params = {name: p for name, p in params.items() if f"grad/{loss_name}/{golden.names[name]}" in golden.data}
    grads = torch.autograd.grad(loss, params.values(), retain_graph=True, allow_unused=True)
    for (name, param), grad in zip(params.items(), grads, strict=True):
        ours = torch.zeros_like(param) if grad is None else grad
        theirs = golden.param(f"grad/{loss_name}", name)
        yield f"grad/{loss_name}", f"grad/{loss_name}/{golden.names[name]}", error(ours, theirs)


@torch.no_grad()
def compare_imagination(golden, outs):
    """Compare imagined trajectories, and what actor and critic learn from them."""
    agent, rollout, ours = golden.agent, outs["rollout"], outs["imagined"]
    states, feat = rollout.states, rollout.feat
    yield from golden.check("imagination", "img/deter", states.deter)
    yield from golden.check("imagination", "img/stoch", states.stoch)
    yield from golden.check("imagination", "img/feat", theirs_of(states))
    logits = agent.world.rssm.predict(states.deter[1:]).raw  # that of the start is the posterior's
    yield "imagination", "img/logit", error(logits, golden["img/logit"][1:])
    yield "imagination", "img/action", error(rollout.actions, golden["img/action"][1:])
    policy = agent.behavior.actor(feat[:-1])
    yield from golden.check("imagination", "img/entropy", policy.entropy())
    yield from golden.check("imagination", "img/logprob", policy.log_prob(rollout.actions))
    for name in ("logpi", "entropy"):
        key = {"logpi": "logprob"}.get(name, name)
        yield "imagination", f"img/{key} of the actor", error(ours[name], golden[f"img/{key}"][:-1])
    yield from golden.check("imagination", "img/reward", ours["reward"])
    yield from golden.check("imagination", "img/discount", ours["cont"])
    yield from golden.check("returns", "img/weight", ours["weight"])
    yield from golden.check("returns", "img/value", ours["value"])
    yield from golden.check("returns", "img/target", ours["ret"])
    yield from golden.check("returns", "img/critic", agent.behavior.critic(feat).mode())
    adv = golden["img/target"][1:] - golden["img/value"][:-2]
    yield "returns", "advantage", error(ours["adv"], adv)
    one = torch.tensor([0.0, 1.0])
    yield "normalizer", "none", error(torch.stack([ours["ret_offset"], ours["ret_scale"]]), one)


def compare_updates(golden):
    """Compare parameters after each recorded update by one backward pass, and the change that it made to each."""
    agent = golden.agent
    for number in sorted({int(m[1]) for key in golden.data if (m := re.match(r"joint(\d+)/", key))}):
        before = {name: param.detach().clone() for name, param in agent.nets.named_parameters()}
        losses, _, outs = golden.loss(number - 1, f"joint{number}/")
        agent.opt.zero_grad()
        agent.total(losses).backward()
        agent.opt.step()
        agent.behavior.improve(outs["rollout"])
        last = f"joint{number - 1}/param" if number > 1 else "param"
        for name, param in agent.nets.named_parameters():
            key, theirs = f"joint{number}/param/{golden.names[name]}", golden.param(f"joint{number}/param", name)
            slow = name.startswith("behavior.slow")
            yield "slow critic" if slow else "parameters", key, error(param, theirs)
            if not slow and param.grad.any():
                yield "change", key, change_error(param - before[name], theirs - golden.param(last, name), param.grad)


def change_error(ours, theirs, grad):
    """Return the norm of the difference of two changes over that of theirs, where the gradient is not negligible."""
    counts = grad.abs() >= 1e-4 * grad.abs().max()
    ours, theirs = ours.detach().double()[counts], theirs.double()[counts]
    return float((ours - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------------------
# Plan2Explore


def compare_ensemble(data):
    """Compare the loss and the reward of DreamerV2's Plan2Explore.

    Its code pairs a state with the action that led there, and ours with the one taken in it: the actions are moved.
    """
    j = json.loads(str(data["config_json"]))
    feat, action, stoch = (torch.as_tensor(data[f"in/{key}"]) for key in ("feat", "action", "stoch"))
    rssm = SimpleNamespace(deter=feat.shape[-1] - stoch.shape[-1], latent=SimpleNamespace(size=stoch.shape[-1]))
    world = SimpleNamespace(rssm=rssm, feat_size=feat.shape[-1], encoder=SimpleNamespace(size=1))
    config = load_config(["--configs", "dreamerv2"], CONFIGS).replace(
        disag_models=j["models"], disag_layers=j["layers"], disag_units=j["units"], disag_log=j["disag_log"]
    )
    explorer = Plan2Explore(world, SimpleNamespace(size=action.shape[-1]), config)
    with torch.no_grad():
        for name, param in explorer.ensemble.named_parameters():
            model, layer, *rest = name.split(".")
            part = "out/out" if layer == "1" else f"dense{int(rest[0]) // 2}"
            param.copy_(torch.as_tensor(data[f"param/ensemble{model}/{part}/{rest[-1]}"]))

    predicted = explorer.predict(feat[:, :-1], action[:, :-1])
    yield "ensemble", "pred", error(predicted, torch.as_tensor(data["pred"]))
    moved, nowhere = torch.cat([action[:, :1], action[:, :-1]], 1), torch.zeros(feat.shape[:2], dtype=torch.bool)
    loss = explorer.ensemble_loss(feat, moved, stoch, nowhere).mean()
    yield "ensemble", "loss", error(loss, torch.as_tensor(data["loss"]))

    feat = torch.as_tensor(data["img/feat"]).requires_grad_()
    beyond = torch.cat([feat, feat[-1:]])  # (H + 2, N, F): the last state's reward is on arriving behind it
    reward = explorer.disagreement(Rollout(None, torch.as_tensor(data["img/action"]), beyond))[1:]
    yield "reward", "img/reward", error(reward, torch.as_tensor(data["img/reward"]))
    (grad,) = torch.autograd.grad(reward.sum(), feat)
    yield "reward", "img/grad_feat", error(grad, torch.as_tensor(data["img/grad_feat"]))
