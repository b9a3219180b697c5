"""The numbers of the authors of the older versions, part by part; what the files hold is said in each one's module."""

import json
import pathlib

import numpy as np
import pytest

from tests import golden

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "family"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # the comparison reads configs.yaml there


def check(name, groups):
    """Assert that a file's results are of these groups, and that no error exceeds its group's tolerance."""
    results = list(golden.compare(DATA / f"{name}.npz"))
    assert {group for group, _, _ in results} == groups
    assert [r for r in results if not r[2] <= golden.TOLERANCES.get(r[0], golden.TOLERANCE)] == []


def perturbed(name, tmp_path, key, change):
    """Return a copy of a file in which the largest entry of one array is off by a factor 1 + `change`."""
    with np.load(DATA / f"{name}.npz") as file:
        data = {key: file[key] for key in file.files}
    value = data[key].copy()
    value[np.unravel_index(np.abs(value).argmax(), value.shape)] *= 1 + change
    np.savez(tmp_path / "file.npz", **{**data, key: value})
    return tmp_path / "file.npz"


# ---------------------------------------------------------------------------
# Dreamer (V1) and PlaNet

V1 = {"embedding", "latents", "heads", "losses", "imagination", "returns", "weights", "parameters", "change"}
V1 |= {f"gradients of {part}" for part in ("image", "reward", "div", "model", "actor", "value")}


def test_dreamer():
    check("v1_pixels", V1)


def test_dreamer_with_ends():
    check("v1_pcont", V1 | {"gradients of pcont"})


def test_the_cell_of_planet():
    check("planet_gru", {"cell"})


@pytest.mark.parametrize(
    "key",
    [
        "wm/kl", "head/pcont", "loss/value", "img/returns", "img/discount", "grad/div/dynamics/gru/bias",
        "grad/-pcont/pcont/hout/bias", "grad/model/decode/h2/kernel", "grad/actor/actor/hout/kernel",
        "after1/param/value/h1/kernel", "after2/param/actor/h0/kernel", "param/dynamics/gru/recurrent_kernel",
    ],
)  # fmt: skip
def test_one_wrong_number_of_dreamer_is_found(key, tmp_path, capsys):
    assert golden.main([perturbed("v1_pcont", tmp_path, key, 1e-2)]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_what_dreamer_lacks_is_named(tmp_path, capsys):
    with np.load(DATA / "v1_pixels.npz") as file:
        data = {key: file[key] for key in file.files}
    config = json.loads(str(data["config_json"]))
    config["config"]["action_dist"] = "onehot"
    np.savez(tmp_path / "file.npz", **{**data, "config_json": json.dumps(config)})
    assert golden.main([tmp_path / "file.npz"]) == 1
    assert "action_dist is onehot" in capsys.readouterr().err
