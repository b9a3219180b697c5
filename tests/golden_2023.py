"""Numbers of DreamerV3 in its 2023 form, computed by danijar/dreamerv3 at 8fa35f8: see `tests.golden`.

Names of the source: `param/NAME` and so on. All three gradients are taken at the same parameters, as our one backward
pass does: the keys whose names do not end in `_seq`.
"""

import json
import math
import re

import numpy as np
import torch

from agents.dreamer import Dreamer
from modalities import obs_spec
from rssm import State, feature
from specs import act_spec
from tests.golden import RecordedLatent, error, make_space
from training.config import CONFIGS, load_config

# Names of parameters here -> there; {0} is the first group, and {i} half of the last number in our name.
HEADS = {"world.reward": "rew", "world.cont": "cont", "behavior.critic": "critic", "behavior.slow": "slow"}
NAMES = [
    (r"world\.encoder\.parts\.vector\.mlp\.\d+\.kernel", "enc/mlp/h{i}/kernel"),
    (r"world\.encoder\.parts\.vector\.mlp\.\d+\.0\.(\w+)", "enc/mlp/h{i}/norm/{0}"),
    (r"world\.encoder\.parts\.image\.convs\.(\d+)\.weight", "enc/cnn/s{0}res/kernel"),
    (r"world\.encoder\.parts\.image\.norms\.(\d+)\.0\.(\w+)", "enc/cnn/s{0}res/norm/{1}"),
    (r"world\.rssm\.start", "rssm/initial"),
    (r"world\.rssm\.cell\.hidden\.0\.kernel", "rssm/img_in/kernel"),
    (r"world\.rssm\.cell\.hidden\.1\.0\.(\w+)", "rssm/img_in/norm/{0}"),
    (r"world\.rssm\.cell\.gru\.linear\.kernel", "rssm/gru/kernel"),
    (r"world\.rssm\.cell\.gru\.norm\.(\w+)", "rssm/gru/norm/{0}"),
    (r"world\.rssm\.prior\.0\.0\.kernel", "rssm/img_out/kernel"),
    (r"world\.rssm\.prior\.0\.1\.0\.(\w+)", "rssm/img_out/norm/{0}"),
    (r"world\.rssm\.prior\.1\.(\w+)", "rssm/img_stats/{0}"),
    (r"world\.rssm\.posterior\.0\.0\.kernel", "rssm/obs_out/kernel"),
    (r"world\.rssm\.posterior\.0\.1\.0\.(\w+)", "rssm/obs_out/norm/{0}"),
    (r"world\.rssm\.posterior\.1\.(\w+)", "rssm/obs_stats/{0}"),
    (r"world\.decoder\.parts\.vector\.mlp\.\d+\.kernel", "dec/mlp/h{i}/kernel"),
    (r"world\.decoder\.parts\.vector\.mlp\.\d+\.0\.(\w+)", "dec/mlp/h{i}/norm/{0}"),
    (r"world\.decoder\.parts\.vector\.outs\.(\d+)\.(\w+)", "dec/mlp/dist_{key}/out/{1}"),
    (r"world\.decoder\.parts\.image\.linear\.(\w+)", "dec/cnn/in/{0}"),
    (r"world\.decoder\.parts\.image\.convs\.(\d+)\.weight", "dec/cnn/s{0}res/kernel"),
    (r"world\.decoder\.parts\.image\.norms\.(\d+)\.0\.(\w+)", "dec/cnn/s{0}res/norm/{1}"),
    (r"world\.decoder\.parts\.image\.out\.weight", "dec/cnn/s{last}res/kernel"),
    (r"world\.decoder\.parts\.image\.out\.bias", "dec/cnn/s{last}res/bias"),
    (r"behavior\.actor\.mlp\.\d+\.kernel", "actor/h{i}/kernel"),
    (r"behavior\.actor\.mlp\.\d+\.0\.(\w+)", "actor/h{i}/norm/{0}"),
    (r"behavior\.actor\.heads\.0\.outs\.(?:mean|logits)\.(\w+)", "actor/dist_out/out/{0}"),
    (r"behavior\.actor\.heads\.0\.outs\.stddev\.(\w+)", "actor/dist_out/std/{0}"),
    (r"(world\.reward|world\.cont|behavior\.critic|behavior\.slow)\.mlp\.\d+\.kernel", "{head}/h{i}/kernel"),
    (r"(world\.reward|world\.cont|behavior\.critic|behavior\.slow)\.mlp\.\d+\.0\.(\w+)", "{head}/h{i}/norm/{1}"),
    (r"(world\.reward|world\.cont|behavior\.critic|behavior\.slow)\.out\.(\w+)", "{head}/dist_out/out/{1}"),
]
GROUPS = {"model": ("world.",), "actor": ("behavior.actor.",), "critic": ("behavior.critic.",)}


def accepts(keys):
    """True if the keys of a file are those of this version."""
    return {"config_json", "param/rssm/img_stats/kernel", "img/actor_loss", "state/slow_updates"} <= keys


def compare(path):
    """Yield (group, name, relative error) for every recorded result."""
    golden = Golden(path)
    yield from compare_model(golden)
    yield from compare_learning(golden)


class Golden:
    """A golden file: its configuration, tensors, and the agent that is made from them."""

    def __init__(self, path):
        with np.load(path) as file:
            self.data = {key: file[key] for key in file.files}
        self.json = j = json.loads(str(self.data["config_json"]))
        check_known(j)
        self.agent = make_agent(j)
        world, behavior = self.agent.world, self.agent.behavior
        self.latent = world.rssm.latent = RecordedLatent(*world.rssm.latent.shape, world.rssm.latent.unimix)
        self.discrete = bool(self.agent.act_spec.classes)
        behavior.actor.noise, behavior.policy = self.noise, self.policy
        self.names = {name: self.translate(name) for name, _ in self.agent.nets.named_parameters()}
        self.orders = self.reorderings()
        with torch.no_grad():
            for name, param in self.agent.nets.named_parameters():
                param.copy_(self.param("param", name))
        missing = {k[6:] for k in self.data if k.startswith("param/")} ^ set(self.names.values())
        assert not missing, f"parameters without a counterpart: {sorted(missing)}"
        behavior.return_norm.range.copy_(torch.stack([self["state/retnorm/low"], self["state/retnorm/high"]]))
        behavior.updates.copy_(self["state/slow_updates"])

    def __getitem__(self, key):
        return torch.as_tensor(np.array(self.data[key]))

    # -- parameters

    def translate(self, name):
        """Return the authors' name of one of our parameters."""
        match, target = next((m, t) for p, t in NAMES if (m := re.fullmatch(p, name)))
        numbers = re.findall(r"(?<=mlp\.)\d+", name)
        fields = {"i": int(numbers[0]) // 2 if numbers else None}
        fields |= {"head": HEADS.get(match[1])} if match.groups() else {}
        if "{key}" in target:
            fields["key"] = list(self.agent.world.decoder.parts["vector"].observed)[int(match[1])]
        if "{last}" in target:
            fields["last"] = len(self.agent.world.decoder.parts["image"].convs)
        return target.format(*match.groups(), **fields)

    def reorderings(self):
        """Return {our name: (axis, indices of theirs in our order)} of what joins its inputs in another order."""
        world, spec = self.agent.world, self.agent.obs_spec
        deter, stoch = world.rssm.deter, world.rssm.latent.size
        hidden = len(world.rssm.cell.gru.linear.kernel) - deter
        orders = {"world.rssm.cell.gru.linear.kernel": (0, rotated(deter, hidden))}  # [deter, x]
        sizes = {kind: part.size for kind, part in world.encoder.parts.items()}
        self.embed = rotated(sizes.get("image", 0), sizes.get("vector", 0))  # [image, vector]
        orders["world.rssm.posterior.0.0.kernel"] = 0, torch.cat([torch.arange(deter), deter + self.embed])
        if "vector" in sizes:
            widths = {key: seen.shape[0] for key, seen in spec.of("vector").items()}
            orders["world.encoder.parts.vector.mlp.0.kernel"] = 0, sorted_by_key(widths)
            orders["world.decoder.parts.vector.mlp.0.kernel"] = 0, rotated(deter, stoch)
        if "image" in sizes:
            channels = {key: seen.shape[-1] for key, seen in spec.of("image").items()}
            orders["world.encoder.parts.image.convs.0.weight"] = 1, sorted_by_key(channels)
        return orders

    def param(self, prefix, name):
        """Return a tensor of theirs, by our name and in our layout."""
        value = self[f"{prefix}/{self.names[name]}"]
        if value.ndim == 4:  # (height, width, in, out), of transposed ones (height, width, out, in)
            value = value.permute(3, 2, 0, 1)
            value = value.flip(2, 3) if name.startswith("world.decoder") else value
        axis, indices = self.orders.get(name, (0, None))
        return value if indices is None else value.index_select(axis, indices)

    # -- inputs and draws

    def batch(self):
        """Return the recorded batch in our time alignment: action[t] is the one that led to step t."""
        keys = [*self.agent.obs_spec, "reward", "is_first", "is_last", "is_terminal"]
        batch = {key: self[f"batch/{key}"] for key in keys}
        batch |= {key: batch[key].float() for key in self.agent.obs_spec.of("vector")}
        (key,) = self.agent.act_spec.widths
        before = self["carry/prev_action"][:, None]
        return batch | {key: torch.cat([before, self["batch/action"][:, :-1]], 1)}

    def carry(self):
        return State(self["carry/deter"], self["carry/stoch"])

    def noise(self, shape, device):
        """Replace `Actor.noise`: recorded noise (H, N, A) of continuous actions, and recorded discrete ones."""
        draws = self["sample/img_action" if self.discrete else "sample/img_action_noise"][:-1]
        assert draws.shape[:2] == shape
        return draws

    def policy(self, deter, stoch, noise):
        """Replace `ImagBehavior.policy`, to which `noise` comes from above."""
        policy = self.agent.behavior.actor(feature(State(deter, stoch)).detach())
        if not self.discrete:
            return policy.sample(noise)
        ((part,),) = (joint.parts for joint in policy.parts)
        return part.straight_through(noise.argmax(-1))

    def loss(self):
        """Return the agent's loss, with the recorded draws in place of random ones: first posterior, then prior."""
        self.latent.draws = iter([self["sample/post"], self["sample/img_stoch"]])
        return self.agent.loss(self.batch(), self.carry())

    def trained(self, group):
        """Return {name: parameter} of one optimizer."""
        named = self.agent.nets.named_parameters()
        return {name: param for name, param in named if param.requires_grad and name.startswith(GROUPS[group])}


def rotated(first, second):
    """Return the indices (first + second,) that put the first inputs behind the second."""
    return torch.cat([torch.arange(first, first + second), torch.arange(first)])


def sorted_by_key(widths):
    """Return the indices that sort by key what is joined as in {key: width}."""
    parts = dict(zip(widths, torch.arange(sum(widths.values())).split([*widths.values()]), strict=True))
    return torch.cat([parts[key] for key in sorted(parts)])


# ---------------------------------------------------------------------------
# The agent of a file


def make_agent(j):
    """Return the agent of a file's configuration."""
    seen = {key: entry for key, entry in j["obs_space"].items() if is_seen(j["encoder"], key, entry)}
    obs_space = {key: make_space(entry | as_numbers(entry), None) for key, entry in seen.items()}
    act_space = {key: make_action_space(entry) for key, entry in j["act_space"].items()}
    spec = obs_spec(obs_space)
    agent = Dreamer(spec, act_spec(act_space), make_config(j, obs_space), torch.get_default_device())
    agent.scales |= {key: j["loss_scales"][seen.kind] for key, seen in spec.items()}
    return agent


def is_seen(section, key, entry):
    """True if a section's expression of its kind, image or vector, matches an observation; others are not seen."""
    expression = {1: "mlp_keys", 3: "cnn_keys"}.get(len(entry["shape"]))
    return expression is not None and re.match(section[expression], key) is not None


def as_numbers(entry):
    """Return what an entry is there: vectors are plain numbers, even if they hold integers."""
    return {"dtype": "float32", "discrete": False} if len(entry["shape"]) == 1 else {}


def make_action_space(entry):
    """Return the Gymnasium space of an action's description, whose shape is that of the one-hot if it is discrete."""
    shape = entry["shape"] if not entry["discrete"] else []
    return make_space({**entry, "shape": shape, "classes": entry["classes"] or math.prod(entry["shape"])}, None)


def make_config(j, obs_space):
    """Return our configuration for a file's: the preset, with all that the file says."""
    scales = j["loss_scales"]
    discrete = any(entry["discrete"] for entry in j["act_space"].values())
    grad = j["actor_grad_disc" if discrete else "actor_grad_cont"]
    values = {
        "imag_horizon": j["imag_horizon"], "horizon": float(j["horizon"]), "lam": j["return_lambda"],
        "free_nats": j["dyn_loss"]["free"], "rssm.deter": j["rssm"]["deter"], "rssm.hidden": j["rssm"]["units"],
        "rssm.stoch": j["rssm"]["stoch"], "rssm.classes": j["rssm"]["classes"], "rssm.unimix": j["rssm"]["unimix"],
        "encoder.symlog": j["encoder"]["symlog_inputs"],
        "actor.min_std": j["actor"]["minstd"], "actor.max_std": j["actor"]["maxstd"],
        "actor.unimix": j["actor"]["unimix"], "actor.entropy": j["actent"],
        "actor.grad": {"backprop": "dynamics", "reinforce": "reinforce"}[grad],
        "critic.slow_rate": j["slow_critic_fraction"], "critic.slow_every": j["slow_critic_update"],
        "critic.slow_reg": scales["slowreg"],
        "return_norm.rate": 1 - j["retnorm"]["decay"], "return_norm.limit": 1 / j["retnorm"]["max"],
        "return_norm.low": j["retnorm"]["perclo"], "return_norm.high": j["retnorm"]["perchi"],
        "loss_scales.policy": scales["actor"], "loss_scales.value": scales["critic"],
        "reward_head.bins": j["reward_head"]["bins"], "critic.bins": j["critic"]["bins"],
    }  # fmt: skip
    values |= {f"loss_scales.{key}": scales[key] for key in ("reward", "cont", "dyn", "rep")}
    for part in ("reward_head", "cont_head", "actor", "critic"):
        values |= {f"{part}.{key}": j[part][key] for key in ("layers", "units")}
    heights = [space.shape[-2] for space in obs_space.values() if len(space.shape) == 3]
    for part in ("encoder", "decoder"):
        values |= {f"{part}.{key}": j[part][f"mlp_{key}"] for key in ("layers", "units")}
        stages = round(math.log2(heights[0] / j[part]["minres"])) if heights else 4
        values |= {f"{part}.depth": j[part]["cnn_depth"], f"{part}.mults": [2**stage for stage in range(stages)]}
    for section in ("model_opt", "actor_opt", "critic_opt"):
        values |= {f"{section}.{key}": j[section][key] for key in ("lr", "eps")}
        values[f"{section}.clip"] = j[section]["clip"] or math.inf
    return load_config(["--configs", "dreamerv3_2023"], CONFIGS).replace(**values)


def check_known(j):
    """Raise ValueError that names what a file requires and this project lacks."""
    known = {
        "rssm.initial": "learned", "rssm.action_clip": 1.0, "encoder.cnn": "resnet", "encoder.cnn_blocks": 0,
        "encoder.resize": "stride", "decoder.cnn": "resnet", "decoder.cnn_blocks": 0, "decoder.resize": "stride",
        "decoder.image_dist": "mse", "decoder.vector_dist": "symlog_mse", "decoder.cnn_sigmoid": False,
        "reward_head.dist": "symlog_disc", "critic.dist": "symlog_disc", "cont_head.dist": "binary",
        "dyn_loss.impl": "kl", "rep_loss.impl": "kl", "rep_loss.free": j["dyn_loss"]["free"],
        "retnorm.impl": "perc_ema", "critic_slowreg": "logprob", "actor_dist_disc": "onehot",
        "actor_dist_cont": "normal", "grad_heads": ["decoder", "reward", "cont"],
        "actor.symlog_inputs": False, "critic.symlog_inputs": False,
    }  # fmt: skip
    for part in ("rssm", "encoder", "decoder", "reward_head", "cont_head", "actor", "critic"):
        known |= {f"{part}.act": "silu", f"{part}.norm": "layer", f"{part}.outnorm": False}
    for part in ("decoder", "reward_head", "cont_head", "actor", "critic"):
        known[f"{part}.inputs"] = ["deter", "stoch"]
    for part in ("model_opt", "actor_opt", "critic_opt"):
        known |= {f"{part}.opt": "adam", f"{part}.wd": 0.0, f"{part}.warmup": 0, f"{part}.lateclip": 0.0}
    for name, value in known.items():
        section, _, key = name.rpartition(".")
        found = (j[section] if section else j).get(key, value)
        if found != value:
            raise ValueError(f"the file's {name} is {found}: only {value} is known here")
    other = [key for key, entry in j["obs_space"].items() if len({is_seen(j[s], key, entry) for s in PARTS}) > 1]
    if other or len(j["act_space"]) > 1:
        raise ValueError(f"the file's {other or list(j['act_space'])}: only one action, and what is seen is predicted")


PARTS = ("encoder", "decoder")

# ---------------------------------------------------------------------------
# Comparison


@torch.no_grad()
def compare_model(golden):
    """Compare embeddings, latents and heads."""
    world, batch = golden.agent.world, golden.batch()
    embed = world.encode(batch)
    yield "embed", "embed", error(embed, golden["wm/embed"].index_select(-1, golden.embed))
    golden.latent.draws = iter([golden["sample/post"]])
    action = golden.agent.act_spec.join(batch)
    states, post = world.rssm.observe(embed, action, batch["is_first"], golden.carry())
    prior = world.rssm.predict(states.deter)
    yield "latents", "deter", error(states.deter, golden["wm/deter"])
    for name, dist in {"post": post, "prior": prior}.items():
        yield "latents", f"{name}_logprob", error(dist.logits, golden[f"wm/{name}_logprob"])
        yield "latents", f"{name}_ent", error(dist.entropy().sum(-1), golden[f"wm/{name}_ent"])
    yield "latents", "kl", error(world.rssm.latent.kl(post, prior), golden["wm/kl"])
    first = world.rssm.initial(1, golden.agent.device)
    yield "latents", "initial/deter", error(first.deter[0], golden["wm/initial/deter"])
    yield "latents", "initial/stoch", error(first.stoch[0], golden["wm/initial/stoch"])
    for key, dist in world.decoder(states).items():
        theirs = golden[f"wm/recon/{key}"]
        yield "heads", f"recon/{key}", error(dist.mean[: len(theirs)], theirs)
    feat = feature(states)
    reward, cont = world.reward(feat), world.cont(feat)
    yield "heads", "rew_logit", error(reward.logits, golden["wm/rew_logit"].log_softmax(-1))
    yield "heads", "rew_mean", error(reward.mode(), golden["wm/rew_mean"])
    for name, value in {"logit": cont.logit, "mean": cont.mean(), "mode": cont.mode()}.items():
        yield "heads", f"cont_{name}", error(value, golden[f"wm/cont_{name}"])


def compare_learning(golden):
    """Compare losses, imagination and gradients, then all updates in the file, on the same batch and draws."""
    agent = golden.agent
    steps = sorted({int(m[1]) for key in golden.data if (m := re.match(r"after(\d+)/", key))})
    masks = {}
    for step in range(1, steps[-1] + 1):
        losses, _, outs = golden.loss()
        if step == 1:
            yield from compare_losses(golden, losses, outs)
            yield from compare_imagination(golden, losses, outs)
            yield from compare_gradients(golden, losses, outs["model"])
        agent.opt.zero_grad()
        agent.total(losses).backward()
        for group in GROUPS:
            for name, param in golden.trained(group).items():
                if step == 1:
                    yield "gradients", golden.names[name], error(param.grad, golden.param("grad", name))
                grad = param.grad.abs()
                masks[name] = (grad >= 1e-4 * grad.max()) & masks.get(name, torch.ones_like(grad, dtype=torch.bool))
        yield from compare_step(golden, step, agent.opt.step(), losses, outs)
        agent.behavior.improve(outs["rollout"])
        if step in steps:
            yield from compare_after(golden, step, masks)


def compare_losses(golden, losses, outs):
    for name in outs["model"]:
        yield "losses", name, error(losses[name], golden[f"loss/{name}"])
    total = golden.agent.total({name: losses[name] for name in outs["model"]})
    yield "losses", "model_mean", error(total, golden["loss/model_mean"])
    # (H, N) there, the mean over H here.
    for ours, theirs in {"policy": "actor", "value": "critic"}.items():
        loss = golden.agent.scales[ours] * losses[ours]
        yield "losses", f"{theirs}_loss", error(loss.flatten(), golden[f"img/{theirs}_loss"].mean(0))
        yield "losses", f"{theirs}_loss_mean", error(loss.mean(), golden[f"img/{theirs}_loss_mean"])


@torch.no_grad()
def compare_imagination(golden, losses, outs):
    """Compare the imagined trajectories and what is computed from them."""
    agent, rollout, outs = golden.agent, outs["rollout"], outs["imagined"]
    world, behavior, (states, actions, feat) = agent.world, agent.behavior, rollout
    yield "imagination", "deter", error(states.deter, golden["img/deter"])
    yield "imagination", "stoch", error(states.stoch, golden["img/stoch"])
    yield "imagination", "action", error(actions, golden["img/action"][:-1])
    prior = world.rssm.predict(states.deter[1:])
    yield "imagination", "prior_logprob", error(prior.logits, golden["img/prior_logprob"][1:])
    (policy,) = behavior.actor(feat).parts
    if golden.discrete:
        yield "imagination", "policy_logprob", error(policy.parts[0].logits, golden["img/policy_logprob"])
    else:
        yield "imagination", "policy_mean", error(policy.mean, golden["img/policy_mean"])
        yield "imagination", "policy_std", error(policy.stddev, golden["img/policy_std"])
    cont = world.cont(feat)
    yield "imagination", "cont_logit", error(cont.logit, golden["img/cont_logit"])
    alive = torch.cat([outs["weight"][:1], outs["cont"][1:] / behavior.discount])
    yield "imagination", "cont", error(alive, golden["img/cont"])
    critic, slow = behavior.critic(feat), behavior.slow(feat)
    yield "imagination", "value_logit", error(critic.logits, golden["img/value_logit"].log_softmax(-1))
    yield "imagination", "reward", error(outs["reward"][1:], golden["img/reward"])
    names = {"weight": "weight", "value": "value", "slow": "slow_value", "logpi": "logpi", "entropy": "ent"}
    for ours, theirs in names.items():
        yield "imagination", theirs, error(outs[ours], golden[f"img/{theirs}"])
    yield "returns", "ret", error(outs["ret"], golden["img/ret"])
    yield "returns", "adv", error(outs["adv"], golden["img/adv"])
    yield "normalizer", "offset", error(outs["ret_offset"], golden["img/ret_offset"])
    yield "normalizer", "scale", error(outs["ret_scale"], golden["img/ret_scale"])
    yield "returns", "critic_ce", error(-critic.log_prob(pad(outs["ret"]))[:-1], golden["img/critic_ce"])
    yield "returns", "critic_reg", error(-critic.log_prob(slow.mode())[:-1], golden["img/critic_reg"])


def pad(x):
    """(H, ...) -> (H + 1, ...), the last twice"""
    return torch.cat([x, x[-1:]])


def compare_gradients(golden, losses, model):
    """Compare the norms of the gradients of each of the model's losses alone, where the file has them."""
    if "gradnorm/matrix" not in golden.data:
        return
    trained = golden.trained("model")
    norms, rows = golden["gradnorm/matrix"], [str(name) for name in golden.data["gradnorm/loss_names"]]
    columns = {str(name): index for index, name in enumerate(golden.data["gradnorm/param_names"])}
    for name in model:
        grads = torch.autograd.grad(losses[name].mean(), trained.values(), retain_graph=True, allow_unused=True)
        ours = torch.stack([torch.zeros(()) if grad is None else grad.norm() for grad in grads])
        theirs = norms[rows.index(name)][[columns[golden.names[param]] for param in trained]]
        yield "gradients", f"norms of {name}", error(ours, theirs)


def compare_step(golden, step, metrics, losses, outs):
    """Compare loss and gradient norm of each optimizer."""
    parts = {"model": outs["model"], "actor": ["policy"], "critic": ["value"]}
    for group, names in parts.items():
        total = golden.agent.total({name: losses[name] for name in names})
        yield "optimizer", f"{group} loss {step}", error(total, golden[f"metric{step}/{group}_opt_loss"])
        norm = golden[f"metric{step}/{group}_opt_grad_norm"]
        yield "optimizer", f"{group} norm {step}", error(metrics[f"{group}_grad_norm"], norm)


def compare_after(golden, step, masks):
    """Compare parameters after an update; `masks`: where gradients are more than rounding."""
    behavior = golden.agent.behavior
    for name, param in golden.agent.nets.named_parameters():
        label, theirs = f"after{step} {golden.names[name]}", golden.param(f"after{step}", name)
        group = "slow critic" if name.startswith("behavior.slow") else "parameters"
        mask = masks.get(name, torch.ones_like(param, dtype=torch.bool))
        difference = (param.detach() - theirs)[mask]
        yield group, label, float(difference.abs().max() / theirs.abs().max().clamp(min=1e-30))
        if name in masks:
            change = (theirs - golden.param("param", name))[mask]
            yield "change", label, float(difference.norm() / change.norm().clamp(min=1e-30))
    low, high = behavior.return_norm.range
    yield "normalizer", f"low after {step}", error(low, golden[f"state_after{step}/retnorm/low"])
    yield "normalizer", f"high after {step}", error(high, golden[f"state_after{step}/retnorm/high"])
    yield "slow critic", f"updates after {step}", error(behavior.updates, golden[f"state_after{step}/slow_updates"])
