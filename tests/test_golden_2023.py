"""The older forms of Dreamer beside their authors' own code: numbers that it computed."""

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


def check(path, groups):
    """Assert that every group is present and no error exceeds its tolerance; return the results."""
    results = list(golden.compare(path))
    assert {group for group, _, _ in results} == groups
    limits = golden.TOLERANCES
    assert [result for result in results if not result[2] <= limits.get(result[0], golden.TOLERANCE)] == []
    return results


# ---------------------------------------------------------------------------
# DreamerV3, 2023 form

FILES_2023 = sorted(DATA.glob("v3_2023_*.npz"))
GROUPS_2023 = {
    "embed", "latents", "heads", "losses", "imagination", "returns", "normalizer", "gradients", "optimizer",
    "parameters", "change", "slow critic",
}  # fmt: skip
every_file_2023 = pytest.mark.parametrize("path", FILES_2023, ids=lambda path: path.stem)


def read_2023(kind):
    """Return a file's arrays and its configuration."""
    with np.load(DATA / f"v3_2023_{kind}.npz") as file:
        data = {key: file[key] for key in file.files}
    return data, json.loads(str(data["config_json"]))


def write(tmp_path, data, config):
    np.savez(tmp_path / "other.npz", **{**data, "config_json": np.array(json.dumps(config))})
    return tmp_path / "other.npz"


@every_file_2023
def test_the_2023_form_computes_its_authors_numbers(path):
    results = check(path, GROUPS_2023)
    assert len(results) > 400
    with np.load(path) as file:
        params = {key[6:] for key in file.files if key.startswith("param/")}
    compared = {name.removeprefix("after2 ") for group, name, _ in results if group in ("parameters", "slow critic")}
    assert params <= compared


def test_both_files_of_the_2023_form_are_there():
    assert [path.stem for path in FILES_2023] == ["v3_2023_pixels", "v3_2023_proprio"]


@pytest.mark.parametrize(
    "key",
    [
        "wm/initial/stoch",
        "img/cont",
        "img/critic_reg",
        "grad/rssm/img_stats/kernel",
        "after1/slow/h0/kernel",
        "metric2/actor_opt_grad_norm",
        "state_after2/slow_updates",
    ],
)
def test_one_wrong_number_of_the_2023_form_is_found(key, tmp_path, capsys):
    data, config = read_2023("proprio")
    value = data[key].astype(np.float32).copy()
    index = np.unravel_index(np.abs(value).argmax(), value.shape)
    value[index] *= 1.01
    assert golden.main([write(tmp_path, {**data, key: value}, config)]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_an_update_that_goes_another_way_is_found(tmp_path, capsys):
    data, config = read_2023("proprio")
    before, after = data["param/critic/h1/kernel"], data["after1/critic/h1/kernel"]
    after = np.where(np.arange(before.size).reshape(before.shape) == 7, 2 * before - after, after)
    assert golden.main([write(tmp_path, {**data, "after1/critic/h1/kernel": after}, config)]) == 1
    assert "change" in next(line for line in capsys.readouterr().out.split("\n") if "ABOVE 1e-03" in line)


def test_keys_of_another_order_than_the_alphabets(tmp_path):
    data, config = read_2023("proprio")
    names = {"height": "z", "position": "position", "velocity": "a"}
    config["obs_space"] = {names[key]: entry for key, entry in config["obs_space"].items()}

    def renamed(key):
        for old, new in names.items():
            for place in ("batch/{}", "loss/{}", "wm/recon/{}"):
                key = place.format(new) if key == place.format(old) else key
            key = key.replace(f"dist_{old}/", f"dist_{new}/")
        return key

    data = {renamed(key): value for key, value in data.items()}
    for labels in ("gradnorm/loss_names", "gradnorm/param_names"):
        data[labels] = np.array([names.get(str(name), renamed(str(name))) for name in data[labels]])
    check(write(tmp_path, data, config), GROUPS_2023)


def test_at_the_very_first_update_the_slow_critic_becomes_a_copy(tmp_path):
    data, config = read_2023("pixels")
    data = {key: value for key, value in data.items() if not key.startswith(("after2", "metric2", "state_after2"))}
    slow = {key: data[key.replace("/slow/", "/critic/")] for key in data if key.startswith("after1/slow/")}
    counts = {"state/slow_updates": np.int32(0), "state_after1/slow_updates": np.int32(1)}
    check(write(tmp_path, data | slow | counts, config), GROUPS_2023)


@pytest.mark.parametrize(
    "section, key, value", [("rssm", "initial", "zeros"), ("actor_opt", "wd", 0.1), (None, "critic_slowreg", "xent")]
)
def test_what_a_file_of_the_2023_form_asks_for_and_we_do_not_have_is_named(tmp_path, capsys, section, key, value):
    data, config = read_2023("proprio")
    (config[section] if section else config)[key] = value
    assert golden.main([write(tmp_path, data, config)]) == 1
    assert f"{key} is {value}: only" in capsys.readouterr().err
