"""The authors' numbers, and a file of our own with other sizes and spaces than theirs."""

import json
import pathlib

import numpy as np
import pytest
import torch

from rssm import State, feature
from tests import golden
from tests.golden import LOSSES, TOLERANCE, Golden, compare, make_agent

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "data").glob("*.npz"))
GROUPS = {
    "tokens", "latents", "heads", "norms", "core", "losses", "replay", "imagination", "normalizer", "gradients",
    "optimizer", "metrics", "slow critic",
}  # fmt: skip
MATHS = {
    "symlog", "symexp", "silu", "twohot", "lambda_return", "normalize", "percentile", "binary", "categorical",
    "kl_balance", "bounded_normal", "slow", "optim", "layer", "maxpool", "init",
}  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the comparison reads configs.yaml there


def check(path, groups):
    """Assert that every group is present and no error exceeds the tolerance."""
    results = list(compare(path))
    assert {group for group, _, _ in results} == groups
    assert [result for result in results if not result[2] <= TOLERANCE] == []
    return results


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_we_compute_the_authors_numbers(path):
    check(path, MATHS if path.stem == "math" else GROUPS)


@pytest.mark.parametrize("stem", ["pixels", "proprio"])
def test_a_recorded_update_computes_them_too(stem):
    """By a stand-in for the recording, which needs a GPU: each replay calls the function."""

    def stand_in(function, generator):
        results = []
        return lambda: results.__setitem__(slice(None), function()), results

    results = list(golden.compare_recorded(ROOT / "tests" / "data" / f"{stem}.npz", record=stand_in))
    assert {group for group, _, _ in results} == {"losses", "gradients", "optimizer", "slow critic", "normalizer"}
    assert [result for result in results if not result[2] <= TOLERANCE] == []


def test_the_authors_files_are_there():
    assert [path.stem for path in FILES] == ["math", "pixels", "proprio"]


def perturbed(path, tmp_path, key, change):
    """Return a copy of a file in which the largest entry of one array is off by a factor 1 + `change`."""
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    value = data[key].copy()
    index = np.unravel_index(np.abs(value).argmax(), value.shape)
    value[index] *= 1 + change
    np.savez(tmp_path / path.name, **{**data, key: value})
    return tmp_path / path.name


@pytest.mark.parametrize(
    "key",
    [
        "wm/deter",
        "grad/dyn/dyngru/kernel",
        "after4/slowval/head/logits/bias",
        "param/enc/mlp0/kernel",
        "img/ret",
    ],
)
def test_one_wrong_number_is_found(key, tmp_path, capsys):
    path = next(path for path in FILES if path.stem == "proprio")
    assert golden.main([perturbed(path, tmp_path, key, 1e-2)]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_a_wrong_number_in_one_of_several_files_is_found(tmp_path, capsys):
    maths = next(path for path in FILES if path.stem == "math")
    wrong = perturbed(maths, tmp_path, "lambda_return/case2/ret", 1e-2)
    assert golden.main([maths]) == 0
    assert golden.main([wrong, maths]) == 1
    text = capsys.readouterr().out
    assert text.count("ABOVE") == 1 and str(wrong) in text


@pytest.mark.parametrize(
    "section, key, value", [("retnorm", "debias", True), ("imag_loss", "slowtar", True), (None, "imag_last", 3)]
)
def test_what_a_file_asks_for_and_we_do_not_have_is_named(tmp_path, capsys, section, key, value):
    path = ROOT / "tests" / "data" / "proprio.npz"
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    config = json.loads(str(data["config_json"]))
    (config[section] if section else config)[key] = value
    np.savez(tmp_path / "other.npz", **{**data, "config_json": json.dumps(config)})
    assert golden.main([str(tmp_path / "other.npz")]) == 1
    assert f"{key} is {value}: only" in capsys.readouterr().err


def test_a_number_that_is_none_is_an_error():
    assert golden.error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert golden.error(torch.ones(3), torch.ones(2)) == float("inf")
    assert golden.error(torch.tensor([1.0, -3.5]), torch.tensor([1.0, -4.0])) == pytest.approx(1 / 8)


# ---------------------------------------------------------------------------
# A file of our own: other sizes, two vectors, two discrete observations, an image, three kinds of actions

OBSERVATIONS = {
    "velocity": {"shape": [3], "dtype": "float32"},
    "camera": {"shape": [16, 32, 2], "dtype": "uint8"},
    "phase": {"shape": [], "dtype": "int32", "discrete": True, "classes": 3},
    "height": {"shape": [], "dtype": "float32"},
    "cards": {"shape": [2], "dtype": "int32", "discrete": True, "classes": [4, 4]},
}
ACTIONS = {
    "c": {"shape": [2], "dtype": "int32", "discrete": True, "classes": [3, 3]},
    "a": {"shape": [2], "dtype": "float32", "discrete": False, "classes": None},
    "b": {"shape": [], "dtype": "int32", "discrete": True, "classes": 5},
}
# Names and layouts that the file must hold, by hand: kernels are (in, out), those of images (height, width, in, out).
EXPECTED = {
    "param/enc/mlp1norm/scale": (10,),
    "param/enc/mlp0/kernel": (3 + 3 + 1 + 2 * 4, 10),
    "param/enc/cnn2/kernel": (3, 3, 12, 16),
    "param/dyn/dynin2/kernel": (2 + 5 + 6, 14),
    "param/dyn/dynhid0/kernel": (3, 16 + 3 * 14, 16),
    "param/dyn/dynhid1/kernel": (3, 16, 16),
    "param/dyn/dyngru/kernel": (3, 16, 48),
    "param/dyn/prior0/kernel": (48, 14),
    "param/dyn/obs1/kernel": (14, 14),
    "param/dyn/obslogit/kernel": (14, 5 * 7),
    "param/dec/vec/phase/logits/kernel": (11, 3),
    "param/dec/vec/height/pred/kernel": (11, 1),
    "param/dec/sp0/kernel": (4, 12, 2 * 4 * 16 // 4),
    "param/dec/conv0/kernel": (3, 3, 12, 8),
    "param/dec/imgout/kernel": (3, 3, 8, 2),
    "param/pol/head/b/logits/kernel": (9, 5),
    "param/pol/head/a/stddev/kernel": (9, 2),
    "param/slowval/mlp/linear1/kernel": (13, 13),
}


def other_json():
    """Return the recorded configuration with every size changed."""
    with np.load(next(path for path in FILES if path.stem == "pixels")) as file:
        j = json.loads(str(file["config_json"]))
    sizes = {
        "B": 2, "T": 5, "imag_length": 3, "horizon": 50, "deter": 48, "hidden": 14, "stoch": 5, "classes": 7,
        "blocks": 3, "unimix": 0.02, "free_nats": 0.5, "imglayers": 1, "obslayers": 2, "dynlayers": 2,
    }  # fmt: skip
    images = {"depth": 4, "mults": [2, 3, 4], "kernel": 3}
    parts = {
        "enc": {"layers": 2, "units": 10, **images},
        "dec": {"layers": 1, "units": 11, "bspace": 4, **images},
        "rewhead": {"layers": 2, "units": 12, "bins": 63},
        "conhead": {"layers": 1, "units": 8},
        "policy": {"layers": 2, "units": 9, "minstd": 0.2},
        "value": {"layers": 2, "units": 13, "bins": 64},
        "slowvalue": {"rate": 0.1, "every": 2},
        "imag_loss": {"lam": 0.9, "actent": 0.01, "slowreg": 0.7},
        "repl_loss": {"lam": 0.9, "slowreg": 0.7},
        "retnorm": {"rate": 0.3, "limit": 0.01, "perclo": 10.0, "perchi": 80.0},
        "loss_scales": {"rec": 0.9, "rew": 1.1, "con": 1.2, "dyn": 0.8, "rep": 0.2, "value": 0.5, "repval": 0.4},
        "opt": {"lr": 1e-3, "agc": 0.2, "beta1": 0.8, "beta2": 0.99},
    }
    for part, values in parts.items():
        j[part] |= values
    return {**j, **sizes, "obs_space": OBSERVATIONS, "act_space": ACTIONS, "policy_dist_disc": "onehot"}


def their_layout(name, value):
    """Return one of our tensors in the authors' layout."""
    value = value.detach()
    if name.endswith("weight"):
        value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value.numpy().copy()


class Writer:
    """Compute with our modules what a file of the authors records, for one step of learning.

    The draws are made from fresh noise, as in training; what is tested is that the file alone brings them all back.
    """

    def __init__(self, j):
        torch.manual_seed(0)
        self.json, self.data = j, {"config_json": json.dumps(j)}
        self.agent = make_agent(j)
        self.imagine, self.agent.behavior.rollout = self.agent.behavior.rollout, self.rollout
        self.classes = self.agent.act_spec.classes
        with torch.no_grad():
            for param in self.agent.nets.parameters():
                param.add_(0.2 * torch.randn_like(param))
        self.agent.behavior.return_norm.range.copy_(torch.tensor([-0.5, 1.5]))
        # The names come from the mapping itself; EXPECTED holds some that a reader can check.
        reader = Golden.__new__(Golden)
        reader.json, reader.agent = j, self.agent
        kinds = {key: "logits" if entry.get("discrete") else "pred" for key, entry in OBSERVATIONS.items()}
        reader.data = {f"param/dec/vec/{key}/{kind}/bias": None for key, kind in kinds.items()}
        self.names = {name: reader.translate(name) for name, _ in self.agent.nets.named_parameters()}
        self.trained = {name: param for name, param in self.agent.nets.named_parameters() if param.requires_grad}

    def write(self, path):
        self.tensors("param", dict(self.agent.nets.named_parameters()))
        self.norm("state")
        self.batch()
        losses, states, outs = self.agent.loss(self.inputs, self.state)
        self.observation(states)
        self.imagination(outs["imagined"], outs["rollout"].states)
        self.replay(states, outs["imagined"]["ret"][0].view(self.inputs["reward"].shape))
        self.losses(losses)
        self.learn(losses)
        np.savez(path, **{key: np.asarray(value) for key, value in self.data.items()})
        return path

    def put(self, prefix, **values):
        values = {key: torch.as_tensor(value).detach().clone() for key, value in values.items()}
        self.data |= {f"{prefix}/{key}": value.numpy() for key, value in values.items()}

    def tensors(self, prefix, values):
        self.data |= {f"{prefix}/{self.names[name]}": their_layout(name, value) for name, value in values.items()}

    def norm(self, prefix):
        low, high = self.agent.behavior.return_norm.range
        self.put(f"{prefix}/retnorm", lo=low, hi=high)

    # -- inputs and draws

    def batch(self):
        b, t = self.json["B"], self.json["T"]
        batch = {key: draw(entry, b, t) for key, entry in OBSERVATIONS.items()}
        batch |= {"reward": torch.randn(b, t), "is_first": torch.zeros(b, t).bool()}
        batch["is_first"][0, 0] = batch["is_first"][1, 3] = True
        batch["is_last"] = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
        batch["is_terminal"] = batch["is_last"].clone()
        taken = {key: draw(entry, b, t) for key, entry in ACTIONS.items()}
        before = {key: draw(entry, b) for key, entry in ACTIONS.items()}
        self.state = State(torch.randn(b, 48), torch.eye(7)[torch.randint(7, (b, 5))])
        self.put("batch", **batch, **taken)
        self.put("carry/prevact", **before)
        self.put("carry", **self.state._asdict())
        # Theirs holds the action taken at a step, ours the one that led to it.
        led = {key: torch.cat([before[key][:, None], taken[key][:, :-1]], 1) for key in ACTIONS}
        self.inputs = {**batch, **{key: self.vector(key, action) for key, action in led.items()}}

    def vector(self, key, action):
        """Encode (B, T, ...) as (B, T, width), one-hot if discrete."""
        if key not in self.classes:
            return action
        parts = zip(action.flatten(2).unbind(-1) if action.ndim > 2 else [action], self.classes[key], strict=True)
        return torch.cat([torch.eye(n)[part.long()] for part, n in parts], -1)

    def rollout(self, world, states):
        """Record the behavior's own rollout: (N, H + 1, ...), indices if discrete."""
        rollout = self.imagine(world, states)
        states, actions, _ = rollout
        self.put("sample", img_stoch=states.stoch[1:].transpose(0, 1))
        unused = torch.zeros(1, *actions.shape[1:])  # the draw in the last state
        vectors = torch.cat([actions, unused]).transpose(0, 1).split([2, 5, 6], -1)
        for key, value in zip("abc", vectors, strict=True):
            if key in self.classes:
                value = torch.stack([part.argmax(-1) for part in value.split(self.classes[key], -1)], -1)
                value = value if ACTIONS[key]["shape"] else value[..., 0]
            self.put("sample/img_action", **{key: value})
        return rollout

    # -- results

    def observation(self, states):
        world, latent = self.agent.world, self.agent.world.rssm.latent
        tokens = world.encode(self.inputs)
        logits = {
            "post": world.rssm.posterior(torch.cat([states.deter, tokens], -1)),
            "prior": world.rssm.prior(states.deter),
        }
        dist = {kind: latent.dist(value) for kind, value in logits.items()}
        self.put("sample", post=states.stoch)
        self.put("wm", tokens=tokens, deter=states.deter, kl=latent.kl(dist["post"], dist["prior"]))
        for kind in dist:
            logit, entropy = logits[kind].unflatten(-1, (5, 7)), dist[kind].entropy().sum(-1)
            self.put("wm", **{f"{kind}_logit": logit, f"{kind}_entropy": entropy})
        self.put("carry_out", deter=states.deter[:, -1], stoch=states.stoch[:, -1])
        for key, out in world.decoder(states).items():
            self.put("wm/recon", **{key: out.mean if hasattr(out, "mean") else cat_logits(out)})
        reward, cont = (head(feature(states)) for head in (world.reward, world.cont))
        self.put("wm", rew_logit=reward.logits, rew_pred=reward.mode(), con_logit=cont.logit)

    def imagination(self, outs, states):
        names = {"reward": "rew", "cont": "con", "value": "val", "slow": "slowval"}
        for ours in ("reward", "cont", "value", "slow", "weight", "ret", "adv", "logpi"):
            self.put("img", **{names.get(ours, ours): outs[ours].T})
        policy = self.agent.behavior.actor(feature(states)[:-1])
        for key, part in zip("abc", policy.parts, strict=True):
            self.put("img/ent", **{key: part.entropy().T})
        self.put("img", deter=states.deter.transpose(0, 1))
        policy = self.agent.behavior.actor(feature(states).transpose(0, 1))
        for key, part in zip("abc", policy.parts, strict=True):
            kinds = {"logits": cat_logits(part)} if key in self.classes else {"mean": part.mean, "stddev": part.stddev}
            self.put(f"img/policy/{key}", **kinds)
        offset, scale, ret = outs["ret_offset"], outs["ret_scale"], outs["ret"]
        normed = (ret - offset) / scale
        self.put("img", roffset=offset, rscale=scale)
        self.put("metric", **{names.get(key, key): outs[key].mean() for key in (*names, "weight")})
        self.put("metric", tar=ret.mean(), ret=normed.mean(), ret_min=normed.min(), ret_max=normed.max())
        self.put("metric", ret_rate=(normed.abs() >= 1).float().mean())
        self.put("metric", adv_std=outs["adv"].numpy().std(), adv_mag=outs["adv"].abs().mean())
        self.put("metric", adv=outs["adv"].mean())

    def replay(self, states, boot):
        behavior, feat = self.agent.behavior, feature(states)
        ret = behavior.replay_returns(self.inputs, boot)
        self.put("rep", boot=boot, ret=ret, val=behavior.critic(feat).mode(), slowval=behavior.slow(feat).mode())

    def losses(self, losses):
        losses = {LOSSES.get(name, name): loss for name, loss in losses.items()}
        self.put("loss", **losses)
        self.put("loss_mean", **{name: loss.mean() for name, loss in losses.items()})
        scales = {**self.json["loss_scales"], **dict.fromkeys(OBSERVATIONS, self.json["loss_scales"]["rec"])}
        self.data["loss_total"] = sum(scales[name] * loss.detach().mean() for name, loss in losses.items()).numpy()
        rows = []
        for loss in losses.values():
            grads = torch.autograd.grad(loss.mean(), self.trained.values(), retain_graph=True, allow_unused=True)
            rows.append([0.0 if grad is None else float(grad.norm()) for grad in grads])
        self.data["gradnorm/matrix"] = np.array(rows, np.float32)
        self.data["gradnorm/loss_names"] = np.array(list(losses))
        self.data["gradnorm/param_names"] = np.array([self.names[name] for name in self.trained])

    def learn(self, losses):
        agent = self.agent
        agent.opt.zero_grad()
        agent.total(losses).backward()
        self.tensors("grad", {name: param.grad for name, param in self.trained.items()})
        before = {name: param.detach().clone() for name, param in self.trained.items()}
        norms = {name: param.grad.norm() for name, param in self.trained.items()}
        for name, norm in norms.items():
            self.put("agc", **{self.names[name]: min(1.0, 0.2 * max(1e-3, before[name].norm()) / norm)})
        agent.opt.step()
        agent.behavior.improve(None)
        moved = torch.cat([(param - before[name]).detach().flatten() for name, param in self.trained.items()])
        self.put("metric", grad_norm=torch.stack([*norms.values()]).norm(), update_rms=moved.square().mean().sqrt())
        self.tensors("after1", dict(agent.nets.named_parameters()))
        self.norm("state_after1")


def draw(entry, *lead):
    """Draw random entries (*lead, *shape) of a space that a file describes."""
    shape = (*lead, *entry["shape"])
    if entry["dtype"] == "uint8":
        return torch.randint(256, shape, dtype=torch.uint8)
    if entry.get("discrete"):
        return torch.randint(int(np.max(entry["classes"])), shape, dtype=torch.int32)
    return 2 * torch.randn(shape)


def cat_logits(dist):
    return torch.cat([part.logits for part in dist.parts], -1)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return Writer(other_json()).write(tmp_path_factory.mktemp("golden") / "other.npz")


def test_the_file_of_our_own_is_written_as_the_authors_would(other):
    with np.load(other) as file:
        assert {key: file[key].shape for key in EXPECTED} == EXPECTED
        assert not np.array_equal(file["param/pol/mlp/linear0/kernel"], file["after1/pol/mlp/linear0/kernel"])
        assert file["sample/img_action/c"].shape == (10, 4, 2) and file["sample/img_action/b"].shape == (10, 4)


def test_files_of_other_sizes_and_spaces_run_as_they_are(other):
    results = check(other, GROUPS - {"norms", "core"})
    losses = {name for group, name, _ in results if group == "losses"}
    assert {*OBSERVATIONS, "rew", "con", "dyn", "rep", "policy", "value", "repval", "total"} <= losses


@pytest.mark.parametrize("key", ["wm/recon/cards", "img/ent/c", "sample/img_stoch"])
def test_one_wrong_number_among_other_spaces_is_found(key, other, tmp_path, capsys):
    assert golden.main([perturbed(other, tmp_path, key, -2)]) == 1
    assert "ABOVE" in capsys.readouterr().out
