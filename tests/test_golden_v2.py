"""Numbers of the authors' code for the older forms."""

import json
import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agents.dreamer import make_optimizer
from tests import golden, golden_v2
from training.config import CONFIGS, load_config

FAMILY = pathlib.Path(__file__).parent / "data" / "family"


def read(path):
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def misses(path):
    """Return the groups of a file, and what is above the tolerance of its group."""
    results = list(golden.compare(path))
    limits = golden.TOLERANCES
    return {group for group, _, _ in results}, [
        (group, name, value) for group, name, value in results if not value <= limits.get(group, golden.TOLERANCE)
    ]


# ---------------------------------------------------------------------------
# DreamerV2

V2 = sorted(FAMILY.glob("v2_*.npz"))
AGENTS_V2 = [path for path in V2 if path.stem != "v2_plan2explore"]
GROUPS_V2 = {
    "embedding", "latents", "heads", "imagination", "returns", "normalizer", "losses", "grad/model", "grad/kl",
    "grad/reward", "grad/actor", "grad/critic", "parameters", "change", "slow critic",
}  # fmt: skip


@pytest.mark.parametrize("path", V2, ids=lambda path: path.stem)
def test_we_compute_the_numbers_of_dreamerv2(path):
    groups, above = misses(path)
    assert above == []
    assert groups >= (GROUPS_V2 if path in AGENTS_V2 else {"ensemble", "reward"})


def test_the_files_of_dreamerv2_are_there():
    assert [path.stem for path in V2] == ["v2_crafter", "v2_pixels", "v2_plan2explore", "v2_proprio"]


@pytest.mark.parametrize("path", AGENTS_V2, ids=lambda path: path.stem)
def test_every_gradient_and_parameter_in_a_file_of_dreamerv2_is_compared(path):
    compared = {name for _, name, _ in golden.compare(path)}
    recorded = {key for key in read(path) if key.startswith(("grad/", "loss/", "head/", "like/", "wm/", "img/"))}
    recorded |= {key for key in read(path) if key.startswith("joint") and "/param/" in key}
    assert recorded <= compared


@pytest.mark.parametrize(
    "name, key",
    [
        ("v2_proprio", "img/target"),
        ("v2_proprio", "grad/actor/actor/out/std/kernel"),
        ("v2_pixels", "img/weight"),
        ("v2_pixels", "joint2/param/actor/out/out/bias"),
        ("v2_crafter", "param/enc/conv1/bias"),
        ("v2_crafter", "joint1/param/rssm/gru/linear/bias"),
        ("v2_plan2explore", "img/reward"),
        ("v2_plan2explore", "loss"),
    ],
)
def test_one_wrong_number_of_dreamerv2_is_found(name, key, tmp_path, capsys):
    data = read(FAMILY / f"{name}.npz")
    value = np.array(data[key])
    value[np.unravel_index(np.abs(value).argmax(), value.shape)] *= 1.01
    np.savez(tmp_path / "wrong.npz", **{**data, key: value})
    assert golden.main([str(tmp_path / "wrong.npz")]) == 1
    assert "ABOVE" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"slow_target": False}, {"grad_heads": ["decoder"]}, {"reward_norm.scale": 2.0}])
def test_what_a_file_of_dreamerv2_asks_for_and_we_do_not_have_is_said(change, tmp_path, capsys):
    data = read(FAMILY / "v2_proprio.npz")
    j = json.loads(str(data["config_json"]))
    for name, value in change.items():
        section, _, key = name.rpartition(".")
        (j["config"][section] if section else j["config"])[key] = value
    np.savez(tmp_path / "other.npz", **{**data, "config_json": json.dumps(j)})
    assert golden.main([str(tmp_path / "other.npz")]) == 1
    assert "known here" in capsys.readouterr().err


PRESETS_V2 = {"v2_proprio": [], "v2_pixels": ["dreamerv2_atari"], "v2_crafter": ["dreamerv2_crafter"]}


@pytest.mark.parametrize("name", PRESETS_V2)
def test_the_presets_of_dreamerv2_have_the_constants_of_their_code(name):
    j = json.loads(str(read(FAMILY / f"{name}.npz")["config_json"]))
    theirs = j["config"]
    ours = load_config(["--configs", "dreamerv2", *PRESETS_V2[name]], CONFIGS)
    sizes = ("units", "depth", "deter", "hidden", "stoch", "classes")
    derived = golden_v2.make_config({**j, "H": ours.imag_horizon})
    for key, value in flat(derived.to_dict()).items():
        if key.rpartition(".")[2] not in sizes:
            assert flat(ours.to_dict())[key] == pytest.approx(value), key
    assert ours.prefill == theirs["prefill"] and ours.pretrain == theirs["pretrain"]
    assert ours.dataset_size == theirs["replay"]["capacity"] and ours.batch_length == theirs["replay"]["maxlen"]
    assert (ours.replay_window == "episode_ends") == theirs["replay"]["prioritize_ends"]
    batch = theirs["dataset"]
    assert ours.batch_size == batch["batch"] and ours.batch_length == batch["length"]
    assert ours.train_ratio == batch["batch"] * batch["length"] * theirs["train_steps"] / theirs["train_every"]
    assert {key: ours.expl_opt[key] for key in golden_v2.OPT} == {
        key: theirs["expl_opt"][name] for key, name in golden_v2.OPT.items()
    }
    assert ours.disag_log == theirs["disag_log"] and ours.disag_models == theirs["disag_models"]
    assert (ours.disag_layers, ours.disag_units) == (theirs["expl_head"]["layers"], theirs["expl_head"]["units"])


def test_the_atari_of_dreamerv2_has_its_no_ops_and_the_actions_of_the_game():
    config = load_config(["--configs", "atari", "dreamerv2", "dreamerv2_atari"], CONFIGS)
    game = config.atari
    assert (game.noops, game.actions, game.sticky, game.gray) == (30, "needed", 0.25, True)
    assert config.size == (64, 64)


def flat(tree, prefix=""):
    """Return a nested mapping as {dotted name: value}."""
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


# -- A file of our own: two images and two vectors whose order is not ours, norms, discrete actions, other sizes


def dense(x, data, name):
    return x @ torch.from_numpy(data[f"param/{name}/kernel"]) + torch.from_numpy(data[f"param/{name}/bias"])


def normed(x, data, name):
    scale, shift = (torch.from_numpy(data[f"param/{name}/{key}"]) for key in ("gamma", "beta"))
    return F.elu(F.layer_norm(x, x.shape[-1:], scale, shift, 1e-3))


def kernel(data, name):
    return torch.from_numpy(data[f"param/{name}/kernel"]).permute(3, 2, 0, 1)


def embed_v2(batch, data):
    """Return their embedding of one step (B, E), from the parameters in their layout."""
    x = torch.cat([batch["side"], batch["front"]], -1).float() / 255 - 0.5
    x = x.permute(0, 3, 1, 2)
    for i in range(4):
        x = F.conv2d(x, kernel(data, f"enc/conv{i}"), torch.from_numpy(data[f"param/enc/conv{i}/bias"]), 2)
        x = normed(x.permute(0, 2, 3, 1), data, f"enc/convnorm{i}").permute(0, 3, 1, 2)
    image = x.permute(0, 2, 3, 1).flatten(1)
    x = torch.cat([batch["speed"], batch["angle"]], -1)
    for i in range(2):
        x = normed(dense(x, data, f"enc/dense{i}"), data, f"enc/densenorm{i}")
    return torch.cat([image, x], -1)


def images_v2(feat, data):
    """Return their decoder's means of both images (B, 64, 64, 4)."""
    x = dense(feat, data, "decoder/convin")[:, :, None, None]
    for i in range(4):
        bias = torch.from_numpy(data[f"param/decoder/conv{i}/bias"])
        x = F.conv_transpose2d(x, kernel(data, f"decoder/conv{i}"), bias, 2)
        if i < 3:
            x = normed(x.permute(0, 2, 3, 1), data, f"decoder/convnorm{i}").permute(0, 3, 1, 2)
    return x.permute(0, 2, 3, 1)


def mlp_v2(feat, data, name, layers):
    for i in range(layers):
        feat = normed(dense(feat, data, f"{name}/dense{i}"), data, f"{name}/norm{i}")
    return dense(feat, data, f"{name}/out/out")


def own_file():
    """Return the contents of a file with one step, B 2, computed here in the layout of theirs."""
    data = read(FAMILY / "v2_crafter.npz")
    j = json.loads(str(data["config_json"]))
    c, rng = j["config"], np.random.default_rng(0)
    j["obs_space"] = {"side": [64, 64, 1], "speed": [2], "front": [64, 64, 3], "angle": [1]}
    c["encoder"] |= {"mlp_keys": ".*", "cnn_keys": ".*", "mlp_layers": [7] * 2, "cnn_depth": 2}
    c["decoder"] |= {"mlp_keys": ".*", "cnn_keys": ".*", "mlp_layers": [6] * 3, "cnn_depth": 2}
    c["rssm"] |= {"deter": 8, "hidden": 5, "stoch": 3, "discrete": 4}
    for part, layers in {"reward_head": 1, "discount_head": 2, "actor": 3, "critic": 2}.items():
        c[part] |= {"layers": layers, "units": 5 + layers}
    shapes = {
        "rssm/img_in": (12 + 4, 5),
        "rssm/img_out_0": (8, 5),
        "rssm/img_dist_0": (5, 12),
        "decoder/convin": (20, 64),
    }
    shapes |= {"rssm/obs_out": (8 + 64 + 7, 5), "rssm/obs_dist": (5, 12), "rssm/gru/linear": (5 + 8, 24)}
    norms = {"rssm/img_in_norm": 5, "rssm/img_out_norm_0": 5, "rssm/obs_out_norm": 5, "rssm/gru/norm": 24}
    for i, (wide, near) in enumerate(zip((4, 2, 4, 8), (2, 4, 8, 16), strict=True)):
        shapes[f"enc/conv{i}"], norms[f"enc/convnorm{i}"] = (4, 4, wide, near), near
    for i, (side, wide, near) in enumerate(zip((5, 5, 6, 6), (64, 8, 4, 2), (8, 4, 2, 4), strict=True)):
        shapes[f"decoder/conv{i}"] = (side, side, near, wide)
        norms |= {f"decoder/convnorm{i}": near} if i < 3 else {}
    heads = {"reward": (1, 6, 1), "discount": (2, 7, 1), "actor": (3, 8, 4), "critic": (2, 7, 1), "slow": (2, 7, 1)}
    stacks = {name: (20, layers, units, "norm") for name, (layers, units, _) in heads.items()}
    stacks |= {"enc": (3, 2, 7, "densenorm"), "decoder": (20, 3, 6, "densenorm")}
    for name, (inputs, layers, units, norm) in stacks.items():
        for i in range(layers):
            shapes[f"{name}/dense{i}"], norms[f"{name}/{norm}{i}"] = (units if i else inputs, units), units
    shapes |= {f"{name}/out/out": (units, out) for name, (_, units, out) in heads.items()}
    shapes |= {"decoder/dense_speed/out": (6, 2), "decoder/dense_angle/out": (6, 1)}
    made = {"config_json": np.array(json.dumps(j))}
    for name, shape in shapes.items():
        outputs = shape[2] if name.startswith("decoder/conv") and len(shape) == 4 else shape[-1]
        made[f"param/{name}/kernel"] = rng.normal(size=shape).astype(np.float32) * 0.3
        made[f"param/{name}/bias"] = rng.normal(size=outputs).astype(np.float32)
    for name, size in norms.items():
        made |= {f"param/{name}/{key}": rng.normal(size=size).astype(np.float32) for key in ("gamma", "beta")}

    lead = (2, 1)
    batch = {key: rng.normal(size=(*lead, *shape)).astype(np.float32) for key, shape in j["obs_space"].items()}
    batch |= {key: rng.integers(0, 256, (*lead, *j["obs_space"][key]), np.uint8) for key in ("side", "front")}
    batch |= {"action": np.eye(4, dtype=np.float32)[rng.integers(4, size=lead)], "reward": np.ones(lead, np.float32)}
    batch |= {key: np.zeros(lead, bool) for key in ("is_first", "is_last", "is_terminal")}
    made |= {f"batch0/{key}": value for key, value in batch.items()}
    made["noise/post"] = rng.random((1, 2, 3)).astype(np.float32)

    batch = {key: torch.from_numpy(value[:, 0]) for key, value in batch.items()}
    zeros, first = torch.zeros(2, 8), torch.cat([torch.zeros(2, 12), batch["action"]], -1)
    x = normed(dense(first, made, "rssm/img_in"), made, "rssm/img_in_norm")
    scale, shift = (torch.from_numpy(made[f"param/rssm/gru/norm/{key}"]) for key in ("gamma", "beta"))
    gates = F.layer_norm(dense(torch.cat([x, zeros], -1), made, "rssm/gru/linear"), (24,), scale, shift, 1e-3)
    reset, cand, update = gates.chunk(3, -1)
    deter = torch.sigmoid(update - 1) * torch.tanh(torch.sigmoid(reset) * cand)
    embed = embed_v2(batch, made)
    hidden = normed(dense(torch.cat([deter, embed], -1), made, "rssm/obs_out"), made, "rssm/obs_out_norm")
    logit = dense(hidden, made, "rssm/obs_dist").view(2, 3, 4)
    index = (torch.from_numpy(made["noise/post"])[0, :, :, None] >= logit.softmax(-1).cumsum(-1)).sum(-1)
    stoch = F.one_hot(index, 4).float()
    feat, vectors = torch.cat([stoch.flatten(1), deter], -1), torch.cat([stoch.flatten(1), deter], -1)
    for i in range(3):
        vectors = normed(dense(vectors, made, f"decoder/dense{i}"), made, f"decoder/densenorm{i}")
    side, front = images_v2(feat, made).split([1, 3], -1)
    results = {"wm/embed": embed, "wm/deter": deter, "wm/post_logit": logit, "wm/stoch": stoch, "wm/feat": feat}
    results |= {"head/decoder/side": side, "head/decoder/front": front}
    results |= {f"head/decoder/{key}": dense(vectors, made, f"decoder/dense_{key}/out") for key in ("speed", "angle")}
    results |= {
        "head/reward": mlp_v2(feat, made, "reward", 1)[:, 0],
        "head/value": mlp_v2(feat, made, "critic", 2)[:, 0],
    }
    results |= {"head/slow_value": mlp_v2(feat, made, "slow", 2)[:, 0]}
    results |= {"head/discount": mlp_v2(feat, made, "discount", 2)[:, 0].sigmoid()}
    results |= {"head/policy_logits": mlp_v2(feat, made, "actor", 3)}
    return made, {key: value[:, None].numpy() for key, value in results.items()}


def test_a_file_of_dreamerv2_with_other_sizes_and_orders_of_keys():
    made, results = own_file()
    found = {name: value for _, name, value in golden_v2.compare_forward(golden_v2.Golden(made | results))}
    assert found.keys() >= results.keys() and max(found.values()) < 1e-5
    wrong = golden_v2.Golden(made | results | {"head/decoder/side": results["head/decoder/side"] + 0.1})
    assert {name for _, name, value in golden_v2.compare_forward(wrong) if value > 1e-4} == {"head/decoder/side"}


def test_the_optimizer_of_dreamerv2_takes_the_form_that_its_preset_names():
    nets = golden_v2.Golden(read(FAMILY / "v2_proprio.npz")).agent.nets
    for preset, form in {"dreamerv2": "TFAdams", "dreamerv3_2023": "Adams"}.items():
        assert type(make_optimizer(nets, load_config(["--configs", preset], CONFIGS))).__name__ == form
