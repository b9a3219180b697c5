"""Compare Dreamer (V1) and PlaNet's recurrent cell with their authors' numbers: part of `python -m tests.golden`."""

import itertools
import json
import re

import numpy as np
import torch
from gymnasium.spaces import Box

import rssm
from agents.dreamer import Dreamer
from modalities import obs_spec
from modalities.image.space import Plain
from rssm import feature
from specs import act_spec
from training.config import CONFIGS, load_config

CELL = {"x", "h", "w_ru", "w_c", "b_ru", "b_c", "r", "u", "c", "new_h"}  # of a file with PlaNet's cell


def accepts(keys):
    """True for the keys of a file of Dreamer's numbers, or of PlaNet's cell's."""
    return keys == CELL or {"param/dynamics/gru/recurrent_kernel", "img/pretanh", "config_json"} <= keys


def compare(path):
    """Yield (group, name, relative error) for every result in the file."""
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    yield from (compare_cell if data.keys() == CELL else compare_agent)(data)


def error(ours, theirs):
    from tests.golden import error

    return error(ours, theirs)


@torch.no_grad()
def compare_cell(data):
    """Compare one step of PlaNet's GRU."""
    x, h, w_ru, w_c, b_ru, b_c = (torch.as_tensor(data[key]) for key in ("x", "h", "w_ru", "w_c", "b_ru", "b_c"))
    cell, seen = rssm.ResetFirstGRU(x.shape[-1], h.shape[-1]), {}
    for layer, kernel, bias in ((cell.gates, w_ru, b_ru), (cell.cand, w_c, b_c)):
        layer.kernel.copy_(kernel), layer.bias.copy_(bias)
        layer.register_forward_hook(lambda module, args, out: seen.update({module: out}))
    new = cell(x, h)
    reset, update = seen[cell.gates].sigmoid().chunk(2, -1)
    for name, ours in {"r": reset, "u": update, "c": seen[cell.cand].tanh(), "new_h": new}.items():
        yield "cell", name, error(ours, data[name])


# ---------------------------------------------------------------------------
# The agent

# Names of parameters here -> there; {0} is the first group, {half} a layer's number, {next} that plus one.
NAMES = [
    (r"world\.encoder\.parts\.image\.convs\.(\d+)\.(\w+)", "encode/h{next}/{1}"),
    (r"world\.rssm\.cell\.hidden\.0\.(\w+)", "dynamics/img1/{0}"),
    (r"world\.rssm\.prior\.0\.0\.(\w+)", "dynamics/img2/{0}"),
    (r"world\.rssm\.prior\.1\.(\w+)", "dynamics/img3/{0}"),
    (r"world\.rssm\.posterior\.0\.0\.(\w+)", "dynamics/obs1/{0}"),
    (r"world\.rssm\.posterior\.1\.(\w+)", "dynamics/obs2/{0}"),
    (r"world\.rssm\.cell\.gru\.inputs\.kernel", "dynamics/gru/kernel"),
    (r"world\.rssm\.cell\.gru\.state\.kernel", "dynamics/gru/recurrent_kernel"),
    (r"world\.rssm\.cell\.gru\.(inputs|state)\.bias", "dynamics/gru/bias"),
    (r"world\.decoder\.parts\.image\.linear\.(\w+)", "decode/h1/{0}"),
    (r"world\.decoder\.parts\.image\.convs\.(\d+)\.(\w+)", "decode/h{after}/{1}"),
    (r"world\.decoder\.parts\.image\.out\.(\w+)", "decode/h5/{0}"),
    (r"(world\.reward|world\.cont|behavior\.critic|behavior\.actor)\.mlp\.(\d+)\.(\w+)", "{head}/h{half}/{2}"),
    (r"(world\.reward|world\.cont|behavior\.critic)\.out\.(\w+)", "{head}/hout/{1}"),
    (r"(behavior\.actor)\.heads\.0\.outs\.(?:mean|stddev)\.(\w+)", "{head}/hout/{1}"),
]
HEADS = {"world.reward": "reward", "world.cont": "pcont", "behavior.critic": "value", "behavior.actor": "actor"}
ON_FEATURES = re.compile(r"(decode/h1|(reward|pcont|value|actor)/h0)/kernel")  # theirs see [stoch, deter]
LOSSES = {"image": "-image", "reward": "-reward", "cont": "-pcont"}  # ours -> theirs, which are likelihoods' gradients
GROUPS = {"model": "world.", "actor": "behavior.actor.", "value": "behavior.critic."}


class Golden:
    """A file of Dreamer's: its configuration, tensors, and the agent that is made from them."""

    def __init__(self, data):
        self.data, self.json = data, json.loads(str(data["config_json"]))
        self.config = make_config(self.json["config"], data)
        image = Plain(0, 255, data["batch0/image"].shape[2:], np.uint8)
        spaces = {"image": image}, {"action": Box(-1, 1, data["batch0/action"].shape[2:])}
        self.agent = Dreamer(obs_spec(spaces[0]), act_spec(spaces[1]), self.config, torch.get_default_device())
        self.latent, self.actor = self.agent.world.rssm.latent, self.agent.behavior.actor
        own = self.agent.nets.named_parameters()
        self.params = {name: param for name, param in own if not name.startswith("behavior.slow.")}
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(self.param("param", name))
        missing = {key[6:] for key in data if key.startswith("param/")} ^ {translate(name) for name in self.params}
        assert not missing, f"parameters without a counterpart: {sorted(missing)}"

    def __getitem__(self, key):
        return torch.as_tensor(np.array(self.data[key]))

    def param(self, prefix, name):
        """Return a tensor of theirs, by our name and in our layout."""
        theirs = translate(name)
        value, deter = self[f"{prefix}/{theirs}"], self.agent.world.rssm.deter
        if value.ndim == 4:  # convolutions, transposed ones too
            value = value.permute(3, 2, 0, 1)
        if ON_FEATURES.fullmatch(theirs):
            value = torch.cat([value[-deter:], value[:-deter]])
        if theirs == "dynamics/gru/bias":
            value = value[0 if ".inputs." in name else 1]
        if theirs.startswith("dynamics/gru/"):
            update, reset, cand = value.chunk(3, -1)
            value = torch.cat([reset, update, cand], -1)
        if theirs.startswith("actor/hout/"):
            value = value.chunk(2, -1)[0 if ".mean." in name else 1]
        return value

    def batch(self, number):
        """Return one of the recorded batches, in which no episode begins, as V1 knows of none."""
        batch = {key: self[f"batch{number}/{key}"] for key in ("image", "action", "reward")}
        batch["is_terminal"] = 1 - self[f"batch{number}/discount"]
        batch["is_first"] = torch.zeros(batch["reward"].shape, dtype=torch.bool)
        return batch

    def draw(self, prefix=""):
        """Let the agent's next draws be the recorded ones of one update: posterior, actions, prior."""
        post, actions, prior = (self[f"{prefix}noise/{key}"] for key in ("post", "imag_action", "imag_stoch"))
        latents = iter([post.transpose(0, 1)[..., None], prior[..., None]])  # (B, T, S, 1), (H, N, S, 1)

        def noise(shape, device):
            found = next(latents)
            assert found.shape[:2] == shape, f"recorded are {found.shape}, asked for are {shape}"
            return found

        self.latent.noise, self.actor.noise = noise, lambda shape, device: actions

    def initial(self):
        return self.agent.world.rssm.initial(len(self.data["batch0/reward"]), self.agent.device)

    def loss(self, number, prefix=""):
        """Return the agent's loss on a batch, with the recorded draws."""
        self.draw(prefix)
        return self.agent.loss(self.batch(number), self.initial())


def translate(name):
    """Return the authors' name of one of our parameters."""
    match, target = next((m, t) for p, t in NAMES if (m := re.fullmatch(p, name)))
    groups = [{"weight": "kernel"}.get(group, group) for group in match.groups()]
    number = next((int(group) for group in groups if group.isdigit()), 0)
    fields = {"next": number + 1, "after": number + 2, "half": number // 2}
    fields["head"] = HEADS.get(groups[0]) if groups else None
    return target.format(*groups, **fields)


def make_config(j, data):
    """Return our configuration for a file's: the preset, with the file's constants and sizes."""
    layers = {head: sum(f"param/{head}/h{i}/kernel" in data for i in range(99)) for head in HEADS.values()}
    values = {
        "size": data["batch0/image"].shape[2:4], "act": j["dense_act"], "cnn_act": j["cnn_act"],
        "encoder.depth": j["cnn_depth"], "decoder.depth": j["cnn_depth"], "clip_rewards": j["clip_rewards"],
        "rssm.deter": j["deter_size"], "rssm.hidden": j["deter_size"], "rssm.stoch": j["stoch_size"],
        "free_nats": j["free_nats"], "cont_head.use": j["pcont"], "horizon": 1 / (1 - j["discount"]),
        "lam": j["disclam"], "imag_horizon": j["horizon"], "actor.max_std": j["action_init_std"],
        "reward_head.layers": layers["reward"], "critic.layers": layers["value"], "actor.layers": layers["actor"],
        "loss_scales.dyn": j["kl_scale"], "loss_scales.rep": j["kl_scale"], "loss_scales.cont": j["pcont_scale"],
    }  # fmt: skip
    values |= {"cont_head.layers": layers["pcont"]} if j["pcont"] else {}
    values |= {f"{part}.units": j["num_units"] for part in ("reward_head", "cont_head", "actor", "critic")}
    for ours, theirs in {"model": "model", "actor": "actor", "critic": "value"}.items():
        values[f"{ours}_opt.lr"] = j[f"{theirs}_lr"]
        values |= {f"{ours}_opt.clip": j["grad_clip"], f"{ours}_opt.decay": j["weight_decay"]}
    for name, known in {"action_dist": "tanh_normal", "weight_decay_pattern": ".*", "dense_act": "elu"}.items():
        if j[name] != known:  # the activation of the RSSM is always elu there
            raise ValueError(f"the file's {name} is {j[name]}: only {known} is known here")
    return load_config(["--configs", "dreamerv1"], CONFIGS).replace(**values)


def compare_agent(data):
    golden = Golden(data)
    yield from compare_forward(golden)
    yield from compare_learning(golden)


@torch.no_grad()
def compare_forward(golden):
    """Compare the world model and the heads at the posterior states of the first batch."""
    world, behavior = golden.agent.world, golden.agent.behavior
    batch = world.prepare(golden.batch(0))
    golden.draw()
    embed = world.encode(batch)
    states, post = world.rssm.observe(embed, batch["action"], batch["is_first"], golden.initial())
    prior, feat = world.rssm.predict(states.deter), feature(states)
    yield "embedding", "embed", error(embed, golden["wm/embed"])
    for name, dist in {"post": post, "prior": prior}.items():
        yield "latents", f"{name}_mean", error(dist.mean, golden[f"wm/{name}_mean"])
        yield "latents", f"{name}_std", error(dist.stddev, golden[f"wm/{name}_std"])
    yield "latents", "post_stoch", error(states.stoch, golden["wm/post_stoch"])
    yield "latents", "post_deter", error(states.deter, golden["wm/post_deter"])
    yield "latents", "feat", error(feat, features(golden, "wm/feat"))
    yield "latents", "kl", error(world.rssm.latent.kl(post, prior), golden["wm/kl"])
    yield "heads", "image", error(world.decoder(states)["image"].mean - 0.5, golden["head/image"])
    yield "heads", "reward", error(world.reward(feat).mode(), golden["head/reward"])
    yield "heads", "value", error(behavior.critic(feat).mode(), golden["head/value"])
    if world.cont is not None:
        yield "heads", "pcont", error(world.cont(feat).mean(), golden["head/pcont"])
    (policy,) = behavior.actor(feat).parts
    yield "heads", "policy_loc", error(policy.mean, golden["head/policy_loc"])
    yield "heads", "policy_scale", error(policy.stddev, golden["head/policy_scale"])


def features(golden, key):
    """Return features of theirs (..., F) in our order: [deter, stoch]."""
    value, deter = golden[key], golden.agent.world.rssm.deter
    return torch.cat([value[..., -deter:], value[..., :-deter]], -1)


def compare_losses(golden, losses, outs):
    """Compare each loss; theirs has one KL, and one sum for the model, in which that of pcont is weighed already."""
    scales = golden.agent.scales
    means = {name: loss.mean() for name, loss in losses.items()}
    for name in ("image", "reward"):
        yield "losses", name, error(means[name], golden[f"loss/{name}"])
    for name in ("dyn", "rep"):
        yield "losses", f"div as {name}", error(means[name], golden["loss/div"])
    if "cont" in losses:
        yield "losses", "pcont", error(scales["cont"] * means["cont"], golden["loss/pcont"])
    model = sum(scales[name] * means[name] for name in outs["model"] if name != "rep")
    yield "losses", "model", error(model, golden["loss/model"])
    yield "losses", "actor", error(means["policy"], golden["loss/actor"])
    yield "losses", "value", error(means["value"], golden["loss/value"])


def compare_imagination(golden, outs, rollout):
    """Compare the imagined states, H without the start, and what is predicted, aimed at and weighed there."""
    yield "imagination", "feat", error(rollout.feat[1:], features(golden, "img/feat"))
    yield "imagination", "pretanh", error(rollout.actions, golden["img/pretanh"].tanh())
    for ours, theirs in {"reward": "reward", "cont": "pcont", "value": "value"}.items():
        yield "imagination", theirs, error(outs[ours][1:], golden[f"img/{theirs}"])
    yield "returns", "returns", error(outs["ret"], golden["img/returns"])
    yield "weights", "discount", error(outs["weight"], golden["img/discount"])


def compare_gradients(golden, losses):
    """Compare the gradients of each loss, and of the sum, which they take in three; before clipping."""
    agent, params = golden.agent, golden.params
    terms = {LOSSES[name]: -losses[name].mean() for name in LOSSES if name in losses}
    terms["div"] = losses["dyn"].mean() + losses["rep"].mean()
    if "-pcont" in terms:
        terms["-pcont"] = agent.scales["cont"] * terms["-pcont"]
    for term, loss in terms.items():
        model = {name: param for name, param in params.items() if name.startswith("world.")}
        grads = torch.autograd.grad(loss, model.values(), retain_graph=True, allow_unused=True)
        for (name, param), grad in zip(model.items(), grads, strict=True):
            theirs = golden.param(f"grad/{term}", name)
            ours = torch.zeros_like(param) if grad is None else grad
            yield f"gradients of {term.removeprefix('-')}", translate(name), error(ours, theirs)
    agent.opt.zero_grad()
    agent.total(losses).backward(retain_graph=True)
    for group, prefix in GROUPS.items():
        for name in (name for name in params if name.startswith(prefix)):
            theirs = golden.param(f"grad/{group}", name)
            yield f"gradients of {group}", translate(name), error(params[name].grad, theirs)


def compare_learning(golden):
    """Compare losses, gradients, and the parameters after each update: batch 0, then batch 1."""
    agent = golden.agent
    steps = sorted({int(m[1]) for key in golden.data if (m := re.match(r"after(\d+)/param/", key))})
    losses, _, outs = golden.loss(0)
    yield from compare_losses(golden, losses, outs)
    yield from compare_imagination(golden, outs["imagined"], outs["rollout"])
    yield from compare_gradients(golden, losses)
    for before, after in itertools.pairwise(["param", *(f"after{step}/param" for step in steps)]):
        step = int(re.findall(r"\d+", after)[0])
        agent.opt.zero_grad()
        losses, _, _ = golden.loss(step - 1, f"after{step}/")
        agent.total(losses).backward()
        grads = {name: param.grad.clone() for name, param in golden.params.items()}  # before clipping, which scales
        old = {name: param.detach().clone() for name, param in golden.params.items()}
        agent.opt.step()
        for name, param in golden.params.items():
            theirs, label = golden.param(after, name), f"{after.removesuffix('/param')} {translate(name)}"
            yield "parameters", label, error(param, theirs)
            change = theirs - golden.param(before, name)
            yield "change", label, change_error(param.detach() - old[name], change, grads[name])


def change_error(ours, theirs, grad):
    """Return the error in the norm of a change, over elements with a gradient of note: Adam divides by its size."""
    large = grad.abs() >= 1e-4 * grad.abs().max()
    difference, scale = (ours - theirs)[large].norm(), theirs[large].norm()
    return float(difference / scale) if scale else float(difference)
