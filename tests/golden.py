"""Compare this project with numbers that the authors' implementation computed: python -m tests.golden FILE.npz...

    python -m tests.golden --device cuda --update recorded tests/data/p*.npz

Each file carries its configuration, parameters, inputs, random draws and results. For every group of results the
largest relative error is printed (largest difference over the tensor's largest magnitude); status 1 if any is above
1e-4, or for the change of parameters in an update above 1e-3. A file with a `config_json` describes a whole agent, of
whatever sizes and spaces it says; one without holds small pieces of mathematics. The older forms have modules of their
own, which know their files by the keys. `--update` computes updates of DreamerV3's agents in another way than as they
are written: compiled, recorded as a CUDA graph, or both.
"""

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import re
import sys
import zipfile

from training import installed

if __name__ == "__main__":
    installed.demand("-m tests.golden")  # before the first package is imported

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch.utils._pytree import tree_map

import ops.distributions as dists
from agents.dreamer import Dreamer
from modalities import obs_spec
from modalities.image.space import Plain
from models import Rollout
from ops.graphs import WARMUP, Captured
from rssm import OneHotLatent, State, feature
from specs import act_spec
from tests.golden_math import compare_math
from training import machine
from training.config import CONFIGS, load_config

TOLERANCE = 1e-4
TOLERANCES = {"change": 1e-3}  # of groups with another: of a change, the norm of the difference over its own
# Modules of the older forms, tried in this order: accepts({key}) -> bool, and compare(path) as here.
FAMILY = ("tests.golden_2023", "tests.golden_v2", "tests.golden_v1")
PARTS = ("enc", "dec", "rewhead", "conhead", "policy", "value")  # networks in a file's configuration

HEAD = r"(world\.reward|world\.cont|behavior\.critic|behavior\.slow)"
# Names of parameters here -> there; {0} is a layer's index.
NAMES = [
    (r"world\.encoder\.parts\.vector\.mlp\.(\d+)\.scale", "enc/mlp{half}norm/scale"),
    (r"world\.encoder\.parts\.vector\.mlp\.(\d+)\.(\w+)", "enc/mlp{half}/{1}"),
    (r"world\.encoder\.parts\.image\.convs\.(\d+)\.(\w+)", "enc/cnn{0}/{1}"),
    (r"world\.encoder\.parts\.image\.norms\.(\d+)\.scale", "enc/cnn{0}norm/scale"),
    (r"world\.rssm\.cell\.embed_(deter|stoch|action)\.0\.(\w+)", "dyn/dynin{part}/{1}"),
    (r"world\.rssm\.cell\.embed_(deter|stoch|action)\.1\.scale", "dyn/dynin{part}norm/scale"),
    (r"world\.rssm\.cell\.hidden\.(\d+)\.(\w+)", "dyn/dynhid{0}/{1}"),
    (r"world\.rssm\.cell\.norms\.(\d+)\.scale", "dyn/dynhid{0}norm/scale"),
    (r"world\.rssm\.cell\.gates\.(\w+)", "dyn/dyngru/{0}"),
    (r"world\.rssm\.(prior|posterior)\.0\.(\d+)\.scale", "dyn/{kind}{half1}norm/scale"),
    (r"world\.rssm\.(prior|posterior)\.0\.(\d+)\.(\w+)", "dyn/{kind}{half1}/{2}"),
    (r"world\.rssm\.(prior|posterior)\.1\.(\w+)", "dyn/{kind}logit/{1}"),
    (r"world\.decoder\.parts\.vector\.mlp\.(\d+)\.scale", "dec/mlp/norm{half}/scale"),
    (r"world\.decoder\.parts\.vector\.mlp\.(\d+)\.(\w+)", "dec/mlp/linear{half}/{1}"),
    (r"world\.decoder\.parts\.vector\.outs\.(\d+)\.(\w+)", "dec/vec/{obs}/{1}"),
    (r"world\.decoder\.parts\.image\.from_deter\.(\w+)", "dec/sp0/{0}"),
    (r"world\.decoder\.parts\.image\.from_stoch\.0\.(\w+)", "dec/sp1/{0}"),
    (r"world\.decoder\.parts\.image\.from_stoch\.1\.scale", "dec/sp1norm/scale"),
    (r"world\.decoder\.parts\.image\.from_stoch\.2\.(\w+)", "dec/sp2/{0}"),
    (r"world\.decoder\.parts\.image\.norm\.scale", "dec/spnorm/scale"),
    (r"world\.decoder\.parts\.image\.convs\.(\d+)\.(\w+)", "dec/conv{mirror}/{1}"),
    (r"world\.decoder\.parts\.image\.norms\.(\d+)\.scale", "dec/conv{mirror}norm/scale"),
    (r"world\.decoder\.parts\.image\.out\.(\w+)", "dec/imgout/{0}"),
    (r"behavior\.actor\.mlp\.(\d+)\.scale", "pol/mlp/norm{half}/scale"),
    (r"behavior\.actor\.mlp\.(\d+)\.(\w+)", "pol/mlp/linear{half}/{1}"),
    (r"behavior\.actor\.heads\.(\d+)\.outs\.(\w+)\.(\w+)", "pol/head/{act}/{1}/{2}"),
    (
        r"(world\.reward|world\.cont|behavior\.critic|behavior\.slow)\.mlp\.(\d+)\.scale",
        "{head}/mlp/norm{half1}/scale",
    ),
    (HEAD + r"\.mlp\.(\d+)\.(\w+)", "{head}/mlp/linear{half1}/{2}"),
    (HEAD + r"\.out\.(\w+)", "{head}/head/{logits}/{1}"),
]
HEADS = {"world.reward": "rew", "world.cont": "con", "behavior.critic": "val", "behavior.slow": "slowval"}
LOSSES = {"reward": "rew", "cont": "con"}


class Golden:
    """A golden file: its configuration, tensors, and the agent that is made from them."""

    def __init__(self, path):
        with np.load(path) as file:
            self.data, self.tensors = {key: file[key] for key in file.files}, {}
        self.json = json.loads(str(self.data["config_json"]))
        self.agent = make_agent(self.json, self.classes)
        latent = self.agent.world.rssm.latent
        self.latent = self.agent.world.rssm.latent = RecordedLatent(*latent.shape, latent.unimix)
        self.agent.behavior.rollout = self.rollout
        self.names = {name: self.translate(name) for name, _ in self.agent.nets.named_parameters()}
        with torch.no_grad():
            for name, param in self.agent.nets.named_parameters():
                param.copy_(self.param("param", name, param))
        norm = self.agent.behavior.return_norm
        norm.range.copy_(torch.stack([self["state/retnorm/lo"], self["state/retnorm/hi"]]))
        missing = {k[6:] for k in self.data if k.startswith("param/")} ^ set(self.names.values())
        assert not missing, f"parameters without a counterpart: {sorted(missing)}"

    def __getitem__(self, key):
        if key not in self.tensors:  # moved once: nothing may be while a CUDA graph is recorded
            self.tensors[key] = torch.as_tensor(np.array(self.data[key]), device=self.agent.device)
        return self.tensors[key]

    def classes(self, key):
        """Return the number of decoder logits for a discrete observation whose entry does not give its classes."""
        bias = self.data.get(f"param/dec/vec/{key}/logits/bias")
        return None if bias is None else bias.size // max(1, int(np.prod(self.json["obs_space"][key]["shape"])))

    def translate(self, name):
        """Return the authors' name of one of our parameters."""
        match, target = next((m, t) for p, t in NAMES if (m := re.fullmatch(p, name)))
        groups = [{"weight": "kernel"}.get(group, group) for group in match.groups()]
        first = groups[0] if groups else ""
        fields = {
            "half": int(first) // 2 if first.isdigit() else None,
            "half1": int(groups[1]) // 2 if len(groups) > 1 and groups[1].isdigit() else None,
            "mirror": len(self.json["dec"]["mults"]) - 2 - int(first) if first.isdigit() else None,
            "part": {"deter": 0, "stoch": 1, "action": 2}.get(first),
            "kind": {"prior": "prior", "posterior": "obs"}.get(first),
            "head": HEADS.get(first),
            "logits": "logit" if first == "world.cont" else "logits",
        }
        if "{obs}" in target:
            key = list(self.agent.world.decoder.parts["vector"].observed)[int(first)]
            fields["obs"] = next(k for k in (f"{key}/pred", f"{key}/logits") if f"param/dec/vec/{k}/bias" in self.data)
        if "{act}" in target:
            fields["act"] = list(self.agent.act_spec.widths)[int(first)]
        return target.format(*groups, **fields)

    def param(self, prefix, name, like):
        """Return a tensor of theirs, by our name and in our layout."""
        value = self[f"{prefix}/{self.names[name]}"]
        if value.ndim == 4:
            value = value.permute(3, 2, 0, 1)
        return value.reshape(like.shape)

    def batch(self):
        """Return the recorded batch in our time alignment: action[t] is the one that led to step t."""
        keys = [*self.json["obs_space"], "reward", "is_first", "is_last", "is_terminal"]
        batch = {key: self[f"batch/{key}"] for key in keys}
        for key in self.agent.act_spec.widths:
            before = self[f"carry/prevact/{key}"][:, None]
            batch[key] = self.encode(key, torch.cat([before, self[f"batch/{key}"][:, :-1]], 1), 2)
        return batch

    def encode(self, key, action, lead):
        """Encode actions as vectors (*lead, width), one-hot if discrete."""
        action = action.reshape(*action.shape[:lead], -1)
        classes = self.agent.act_spec.classes
        return dists.one_hots(action, classes[key]) if key in classes else action.float()

    def actions(self):
        """Return the recorded policy draws (H, N, A)."""
        keys = self.agent.act_spec.widths
        draws = [self.encode(key, self[f"sample/img_action/{key}"], 2) for key in keys]
        return torch.cat(draws, -1).transpose(0, 1)[:-1]

    def carry(self):
        return State(self["carry/deter"], self["carry/stoch"])

    def observe(self, embed, batch):
        """Infer the states of the recorded batch by the recorded draws: as RSSM.observe."""
        self.latent.draws = iter([self["sample/post"]])
        action = self.agent.act_spec.join(batch)
        return self.agent.world.rssm.observe(embed, action, batch["is_first"], self.carry())

    @torch.no_grad()
    def rollout(self, world, states):
        """Imagine along the recorded actions, in place of the behavior's own rollout."""
        start = states.map(lambda x: x.flatten(0, 1))
        states, actions = world.rssm.imagine(start, self.actions(), self.json["imag_length"])
        return Rollout(states, actions, feature(states))

    def loss(self):
        """Return the agent's loss, with the recorded draws in place of random ones: first posterior, then prior."""
        self.latent.draws = iter([self["sample/post"], self["sample/img_stoch"].transpose(0, 1)])
        return self.agent.loss(self.batch(), self.carry())


def make_agent(j, classes=lambda key: None):
    """Return the agent of a file's configuration.

    Args:
      classes: function of an observation's key -> its number of classes, where the configuration does not tell.
    """
    obs_space = {key: make_space(entry, classes(key)) for key, entry in j["obs_space"].items()}
    act_space = {key: make_space(entry, None) for key, entry in j["act_space"].items()}
    return Dreamer(obs_spec(obs_space), act_spec(act_space), make_config(j), torch.get_default_device())


def make_space(entry, classes):
    """Return the Gymnasium space of a file's description; `classes` is used if an integer's entry lacks them."""
    shape, dtype = tuple(entry["shape"]), np.dtype(entry["dtype"])
    if dtype == np.uint8 and len(shape) == 3:
        return Plain(0, 255, shape, np.uint8)
    if not entry.get("discrete", dtype.kind in "iub"):
        return Box(-np.inf, np.inf, shape or (1,), np.float32)
    classes = entry.get("classes") or classes or 2
    classes = np.broadcast_to(np.asarray(classes).flatten(), int(np.prod(shape, dtype=int))).tolist()
    return MultiDiscrete(classes) if shape else Discrete(classes[0])


def make_config(j):
    """Return our configuration for a file's."""
    values = {
        "imag_horizon": j["imag_length"], "horizon": j["horizon"], "free_nats": j["free_nats"],
        "lam": j["imag_loss"]["lam"], "rssm.deter": j["deter"], "rssm.hidden": j["hidden"], "rssm.stoch": j["stoch"],
        "rssm.classes": j["classes"], "rssm.blocks": j["blocks"], "rssm.dyn_layers": j["dynlayers"],
        "rssm.img_layers": j["imglayers"], "rssm.obs_layers": j["obslayers"], "rssm.unimix": j["unimix"],
        "decoder.blocks": j["dec"]["bspace"], "reward_head.bins": j["rewhead"]["bins"],
        "critic.bins": j["value"]["bins"], "critic.slow_rate": j["slowvalue"]["rate"],
        "critic.slow_every": j["slowvalue"]["every"], "critic.slow_reg": j["imag_loss"]["slowreg"],
        "encoder.symlog": j["enc"].get("symlog", True),
        "actor.min_std": j["policy"]["minstd"], "actor.max_std": j["policy"]["maxstd"],
        "actor.entropy": j["imag_loss"]["actent"],
        "actor.unimix": 0.0 if j["policy_dist_disc"] == "categorical" else j["policy"]["unimix"],
        "return_norm.rate": j["retnorm"]["rate"], "return_norm.limit": j["retnorm"]["limit"],
        "return_norm.low": j["retnorm"]["perclo"], "return_norm.high": j["retnorm"]["perchi"],
    }  # fmt: skip
    sections = {"reward_head": "rewhead", "cont_head": "conhead", "actor": "policy", "critic": "value"}
    for ours, theirs in {**sections, "encoder": "enc", "decoder": "dec"}.items():
        values |= {f"{ours}.{key}": j[theirs][key] for key in ("layers", "units")}
    for ours, theirs in {"encoder": "enc", "decoder": "dec"}.items():
        values |= {f"{ours}.{key}": j[theirs][key] for key in ("depth", "mults", "kernel")}
    scales = {"reward": "rew", "cont": "con"}
    for key in ("rec", "reward", "cont", "dyn", "rep", "policy", "value", "repval"):
        values[f"loss_scales.{key}"] = j["loss_scales"][scales.get(key, key)]
    for key in ("lr", "agc", "eps", "beta1", "beta2", "warmup"):
        values[f"opt.{key}"] = j["opt"][key]
    check_known(j)
    return load_config([], CONFIGS).replace(**values)


def check_known(j):
    """Raise ValueError that names what a file requires and this project lacks."""
    known = {
        "imag_last": 0, "contdisc": True, "absolute": False, "reward_grad": True, "repval_loss": True,
        "repval_grad": True, "ac_grads": False, "policy_dist_cont": "bounded_normal", "enc.outer": False,
        "enc.strided": False, "dec.outer": False, "dec.strided": False, "retnorm.impl": "perc",
        "retnorm.debias": False, "opt.momentum": True, "opt.wd": 0, "opt.schedule": "const",
        "imag_loss.slowtar": False,
        "repl_loss.lam": j["imag_loss"]["lam"], "repl_loss.slowreg": j["imag_loss"]["slowreg"],
        "rewhead.output": "symexp_twohot", "value.output": "symexp_twohot", "conhead.output": "binary",
    }  # fmt: skip
    known |= {f"{part}.{key}": value for part in PARTS for key, value in {"act": "silu", "norm": "rms"}.items()}
    for name, value in known.items():
        section, _, key = name.rpartition(".")
        found = (j[section] if section else j).get(key, value)
        if found != value:
            raise ValueError(f"the file's {name} is {found}: only {value} is known here")


class RecordedOneHot(dists.OneHot):
    """Categorical whose noise is recorded draws: `sample` returns them, with its own gradient."""

    def sample(self, noise):
        return self.straight_through(noise.argmax(-1))


class RecordedLatent(OneHotLatent):
    """Replay recorded draws (..., S, K) in place of random ones: those of the iterator `draws`, one per call."""

    def noise(self, shape, device):
        draws = next(self.draws)
        assert draws.shape == (*shape, *self.shape), f"recorded are {draws.shape}, asked for are {shape}"
        return draws

    def dist(self, logits):
        return RecordedOneHot(logits.unflatten(-1, self.shape), self.unimix)


def error(ours, theirs):
    """Return the largest difference over the largest magnitude; infinite if shapes differ or a number is not finite."""
    ours, theirs = (torch.as_tensor(x).detach().double().cpu() for x in (ours, theirs))
    if ours.numel() != theirs.numel() or not ours.isfinite().all():
        return float("inf")
    scale = theirs.abs().max()
    difference = (ours.flatten() - theirs.flatten()).abs().max()
    return float(difference / scale) if scale else float(difference)


def compare_agent(path):
    """Yield (group, name, relative error) for every recorded result of an agent's file."""
    golden = Golden(path)
    yield from compare_forward(golden)
    yield from compare_core(golden)
    yield from compare_learning(golden)


def compare_compiled(path):
    """Yield (group, name, relative error) of what is learned from an agent's file by an agent that is compiled."""
    golden = Golden(path)
    golden.agent.compile_parts()
    with donated_buffers(False):  # of which the gradient of each loss alone would be the end
        yield from compare_learning(golden)


def compare_recorded(path, compile=False, record=None):
    """Yield (group, name, relative error) of updates that are replayed from a CUDA graph.

    record: as of `Captured`.
    """
    golden = Golden(path)
    agent, start = golden.agent, tree_map(clone, golden.agent.state_dict())
    if compile:
        agent.compile_parts()

    trained = {name: param for name, param in agent.nets.named_parameters() if param.requires_grad}

    def update(_):
        agent.opt.zero_grad()
        losses, _, outs = golden.loss()
        total = agent.total(losses)
        total.backward()
        grads = {name: param.grad.clone() for name, param in trained.items()}  # the optimizer clips them in place
        agent.opt.step()
        agent.behavior.improve(outs["rollout"])
        return total.detach(), {name: loss.detach().mean() for name, loss in losses.items()}, grads

    recorded, steps, nothing = Captured(update, record=record), recorded_steps(golden), torch.zeros(())
    with torch.device("cpu"):  # as in a run: constants come from there, which is no copy
        for _ in range(WARMUP):
            recorded(nothing)
    agent.load_state_dict(start)
    for step in range(1, steps[-1] + 1):
        with torch.device("cpu"):
            total, means, grads = recorded(nothing)
        if step == 1:
            yield "losses", "total", error(total, golden["loss_total"])
            for name, value in means.items():
                yield "losses", f"mean {name}", error(value, golden[f"loss_mean/{LOSSES.get(name, name)}"])
            for name, param in trained.items():
                yield "gradients", golden.names[name], error(grads[name], golden.param("grad", name, param))
        if step in steps:
            yield from compare_after(golden, step)


def clone(leaf):
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


@contextlib.contextmanager
def donated_buffers(allowed):
    """Let a compiled backward pass reuse what the forward one kept, or not."""
    from torch._functorch import config

    with config.patch(donated_buffer=allowed):
        yield


@contextlib.contextmanager
def captured_norms(golden):
    """Record the output of every norm layer whose result the file holds: {their name: first output}."""
    seen, hooks = {}, []
    for name in golden.names:
        key = golden.names[name].removesuffix("/scale")
        if f"debug/{key}" in golden.data:
            module = golden.agent.nets.get_submodule(name.rsplit(".", 1)[0])
            hooks.append(
                module.register_forward_hook(lambda m, i, out, key=key: seen.update({key: seen.get(key, out)}))
            )
    yield seen
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def compare_forward(golden):
    world, json = golden.agent.world, golden.json
    with captured_norms(golden) as norms:
        yield from compare_states(golden, world, json)
    for key, out in norms.items():
        theirs = torch.nn.functional.silu(golden[f"debug/{key}"])  # recorded before the activation
        yield "norms", key, error(out.flatten()[: theirs.numel()], theirs)


def compare_states(golden, world, json):
    batch = golden.batch()
    tokens = world.encode(batch)
    yield "tokens", "tokens", error(tokens, golden["wm/tokens"])
    states, post = golden.observe(tokens, batch)
    prior = world.rssm.predict(states.deter)
    yield "latents", "deter", error(states.deter, golden["wm/deter"])
    for name, dist in {"post": post, "prior": prior}.items():
        theirs = dists.OneHot(golden[f"wm/{name}_logit"], json["unimix"])
        yield "latents", f"{name}_logit", error(dist.logits, theirs.logits)
        yield "latents", f"{name}_entropy", error(dist.entropy().sum(-1), golden[f"wm/{name}_entropy"])
    yield "latents", "kl", error(world.rssm.latent.kl(post, prior), golden["wm/kl"])
    yield "latents", "carry_out/deter", error(states.deter[:, -1], golden["carry_out/deter"])
    yield "latents", "carry_out/stoch", error(states.stoch[:, -1], golden["carry_out/stoch"])
    feat = feature(states)
    for key, dist in world.decoder(states).items():
        ours, theirs = decoded(dist, golden[f"wm/recon/{key}"])
        yield "heads", f"recon/{key}", error(ours[: len(theirs)], theirs)
    yield "heads", "rew_logit", error(world.reward(feat).logits, golden["wm/rew_logit"].log_softmax(-1))
    yield "heads", "rew_pred", error(world.reward(feat).mode(), golden["wm/rew_pred"])
    yield "heads", "con_logit", error(world.cont(feat).logit, golden["wm/con_logit"])


def decoded(dist, theirs):
    """Return our decoder's output in the recorded form: a mean; for integers log-probabilities or classes."""
    if hasattr(dist, "mean"):
        return dist.mean, theirs
    logits = torch.cat([part.logits for part in dist.parts], -1)
    if theirs.numel() != logits.numel():
        return dist.mode(), theirs
    theirs = dists.Classes(theirs.reshape(logits.shape), dist.classes)
    return logits, torch.cat([part.logits for part in theirs.parts], -1)


@torch.no_grad()
def compare_core(golden):
    cell = golden.agent.world.rssm.cell
    if "core/in_deter" not in golden.data:
        return
    deter, stoch = golden["core/in_deter"], golden["core/in_stoch"].flatten(1)
    gates = []
    hook = cell.gates.register_forward_hook(lambda m, i, out: gates.append(out))
    action = cell.prepare(golden["core/in_action_squashed"])
    out = cell(deter, stoch, action)
    hook.remove()
    reset, cand, update = gates[0].chunk(3, -1)
    yield "core", "x0", error(cell.embed_deter(deter), golden["core/x0"])
    yield "core", "x1", error(cell.embed_stoch(stoch), golden["core/x1"])
    yield "core", "x2", error(action, golden["core/x2"])
    yield "core", "reset_gate", error(reset.sigmoid(), golden["core/reset_gate"])
    yield "core", "cand", error((reset.sigmoid() * cand).tanh(), golden["core/cand"])
    yield "core", "update_gate", error((update - 1).sigmoid(), golden["core/update_gate"])
    yield "core", "out_deter", error(out, golden["core/out_deter"])


def compare_imagination(golden, outs, states):
    """Compare imagination. outs: (H, N) results of the behavior's losses; states: imagined State (H + 1, N, ...)."""
    keys = {"reward": "rew", "cont": "con", "value": "val", "slow": "slowval", "weight": "weight", "ret": "ret"}
    for ours, theirs in {**keys, "adv": "adv", "logpi": "logpi"}.items():
        yield "imagination", theirs, error(outs[ours].T, golden[f"img/{theirs}"])
    states = states.map(lambda x: x.transpose(0, 1))
    yield "imagination", "deter", error(states.deter, golden["img/deter"])
    yield from compare_policy(golden, feature(states))
    entropy = sum(golden[f"img/ent/{key}"] for key in golden.agent.act_spec.widths)
    yield "imagination", "ent", error(outs["entropy"].T, entropy)
    yield "normalizer", "offset", error(outs["ret_offset"], golden["img/roffset"])
    yield "normalizer", "scale", error(outs["ret_scale"], golden["img/rscale"])


def compare_policy(golden, feat):
    """Compare the policy on features (N, H + 1, F) of the imagined states."""
    with torch.no_grad():
        policy = golden.agent.behavior.actor(feat)
    for key, dist in zip(golden.agent.act_spec.widths, policy.parts, strict=True):
        name = f"img/policy/{key}"
        if hasattr(dist, "mean"):
            yield "imagination", f"{key} mean", error(dist.mean, golden[f"{name}/mean"])
            yield "imagination", f"{key} stddev", error(dist.stddev, golden[f"{name}/stddev"])
        else:
            ours, theirs = decoded(dist, golden[f"{name}/logits"])
            yield "imagination", f"{key} logits", error(ours, theirs)


@torch.no_grad()
def compare_replay(golden):
    """Compare the critic on the replayed sequence."""
    behavior, batch = golden.agent.behavior, golden.batch()
    states, _ = golden.observe(golden.agent.world.encode(batch), batch)
    yield "replay", "ret", error(behavior.replay_returns(batch, golden["rep/boot"]), golden["rep/ret"])
    yield "replay", "val", error(behavior.critic(feature(states)).mode(), golden["rep/val"])
    yield "replay", "slowval", error(behavior.slow(feature(states)).mode(), golden["rep/slowval"])


def compare_losses(golden, losses):
    for name, loss in losses.items():
        theirs = LOSSES.get(name, name)
        yield "losses", theirs, error(loss, golden[f"loss/{theirs}"])
        yield "losses", f"mean {theirs}", error(loss.mean(), golden[f"loss_mean/{theirs}"])
    yield "losses", "total", error(golden.agent.total(losses), golden["loss_total"])


def compare_gradients(golden, losses):
    """Compare the gradients of the sum and of each loss alone; leave those of the sum in place."""
    agent = golden.agent
    trained = {name: param for name, param in agent.nets.named_parameters() if param.requires_grad}
    norms = golden["gradnorm/matrix"]
    columns = {str(name): i for i, name in enumerate(golden.data["gradnorm/param_names"])}
    for name, loss in losses.items():
        row = norms[[str(n) for n in golden.data["gradnorm/loss_names"]].index(LOSSES.get(name, name))]
        grads = torch.autograd.grad(loss.mean(), trained.values(), retain_graph=True, allow_unused=True)
        ours = torch.stack([torch.zeros(()) if grad is None else grad.norm() for grad in grads])
        theirs = torch.stack([row[columns[golden.names[name]]] for name in trained])
        yield "gradients", f"norms of {name}", error(ours, theirs)
    agent.opt.zero_grad()
    agent.total(losses).backward()
    for name, param in trained.items():
        yield "gradients", golden.names[name], error(param.grad, golden.param("grad", name, param))
    for name, param in trained.items():
        limit = agent.opt.agc * param.detach().norm().clamp(min=1e-3)
        factor = (limit / param.grad.norm().clamp(min=1e-30)).clamp(max=1)
        yield "optimizer", f"agc {golden.names[name]}", error(factor, golden[f"agc/{golden.names[name]}"])


def compare_metrics(golden, outs, norm):
    ret = (outs["ret"] - outs["ret_offset"]) / outs["ret_scale"]
    ours = {
        "adv_std": outs["adv"].std(correction=0), "adv_mag": outs["adv"].abs().mean(), "rew": outs["reward"].mean(),
        "con": outs["cont"].mean(), "val": outs["value"].mean(), "slowval": outs["slow"].mean(),
        "weight": outs["weight"].mean(), "tar": outs["ret"].mean(), "ret": ret.mean(), "ret_min": ret.min(),
        "ret_max": ret.max(), "ret_rate": (ret.abs() >= 1).float().mean(), "grad_norm": norm,
    }  # fmt: skip
    adv = outs["adv"].mean() - golden["metric/adv"]  # a mean of terms that cancel: relative to their magnitude
    yield "metrics", "adv", float(adv.detach().abs() / golden["metric/adv_mag"])
    for name, value in ours.items():
        yield "metrics", name, error(value, golden[f"metric/{name}"])


def compare_learning(golden):
    """Compare losses, gradients and then all optimizer steps in the file, on the same batch and draws."""
    agent = golden.agent
    steps = recorded_steps(golden)
    totals = []
    for step in range(1, steps[-1] + 1):
        losses, _, outs = golden.loss()
        totals.append(agent.total(losses).detach())
        if step == 1:
            yield from compare_losses(golden, losses)
            yield from compare_replay(golden)
            yield from compare_imagination(golden, outs["imagined"], outs["rollout"].states)
            yield from compare_gradients(golden, losses)
        else:
            agent.opt.zero_grad()
            agent.total(losses).backward()
        before = agent.opt.flat.clone()
        metrics = agent.opt.step()
        agent.behavior.improve(outs["rollout"])
        if step == 1:
            yield from compare_metrics(golden, outs["imagined"], metrics["grad_norm"])
            update = (agent.opt.flat - before).square().mean().sqrt()
            yield "optimizer", "update_rms", error(update, golden["metric/update_rms"])
        if step in steps:
            yield from compare_after(golden, step)
    if "loss_total_steps" in golden.data:
        yield "losses", "total of each step", error(torch.stack(totals), golden["loss_total_steps"])


def recorded_steps(golden):
    """Return the numbers of the updates after which a file has parameters."""
    return sorted({int(m[1]) for k in golden.data if (m := re.match(r"after(\d+)/", k))})


def compare_after(golden, step):
    for name, param in golden.agent.nets.named_parameters():
        group = "slow critic" if name.startswith("behavior.slow") else "optimizer"
        theirs = golden.param(f"after{step}", name, param)
        yield group, f"after{step} {golden.names[name]}", error(param, theirs)
    low, high = golden.agent.behavior.return_norm.range
    yield "normalizer", f"lo after {step}", error(low, golden[f"state_after{step}/retnorm/lo"])
    yield "normalizer", f"hi after {step}", error(high, golden[f"state_after{step}/retnorm/hi"])


def compare(path):
    """Yield (group, name, relative error) for every result in a file."""
    with zipfile.ZipFile(path) as file:
        keys = {name.removesuffix(".npy") for name in file.namelist()}
    for name in FAMILY:
        module = importlib.import_module(name) if importlib.util.find_spec(name) else None
        if module and module.accepts(keys):
            yield from module.compare(path)
            return
    yield from (compare_agent if "config_json" in keys else compare_math)(path)


WAYS = {  # of computing an update
    "written": compare,
    "compiled": compare_compiled,
    "recorded": compare_recorded,
    "both": functools.partial(compare_recorded, compile=True),
}


def main(argv):
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="tests.golden", description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    parser.add_argument("--device", default="cpu", help="where it is computed (default: cpu)")
    parser.add_argument("--update", default="written", choices=WAYS, help="how (default: written)")
    args = parser.parse_args([*map(str, argv)])
    machine.exact_products(True)
    with torch.device(machine.choose_device(args.device)):
        return compare_all(args.files, WAYS[args.update])


def compare_all(paths, way):
    """Print a table for each file; return 1 if a file could not be read or is not equaled, else 0."""
    failed = False
    for path in paths:
        groups = {}
        try:
            for group, name, value in way(path):
                groups.setdefault(group, []).append((value, name))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{path}\n  {'group':<16} {'checks':>6}  {'largest relative error':<22}  where")
        for group, entries in groups.items():
            value, name = max(entries)
            tolerance = TOLERANCES.get(group, TOLERANCE)
            failed |= not value <= tolerance
            mark = "" if value <= tolerance else f"   ABOVE {tolerance:.0e}"
            print(f"  {group:<16} {len(entries):>6}  {value:<22.1e}  {name}{mark}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
