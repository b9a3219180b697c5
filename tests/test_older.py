"""Logdirs of an older version of this project: one for each version of Dreamer, and one with an explorer.

Each has a batch and the results that its version computed from it: losses, gradients, parameters after a step,
actions. Those of `CHANGED` were left behind on purpose, for the authors' numbers (tests/test_golden_family.py).
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch

import dreamer
import inference_video
from agents import make_agent
from training.config import CONFIGS, load_config

LOGDIRS = sorted((pathlib.Path(__file__).parent / "data" / "logdirs").iterdir())
every_logdir = pytest.mark.parametrize("logdir", LOGDIRS, ids=lambda path: path.name)
GONE = "explorer.behavior."  # a name that is now expl_behavior.
# Losses and parameters whose numbers changed on purpose, to follow the authors' code, by what their names begin with:
# returns and values of Dreamer and DreamerV2, the models of Plan2Explore, which minimize the sum of their negative
# log-likelihoods, and all of the 2023 form: its episodes end where an end is likelier, its start has no gradient.
CHANGED = {
    "dreamerv1": ("policy", "value", "behavior."),
    "dreamerv2": ("policy", "value", "behavior."),
    "dreamerv3_2023": ("",),
    "plan2explore": ("disag", "explorer."),
}
OTHER_ACTIONS = {"dreamerv1": ("mode",), "dreamerv3_2023": ("sample", "mode")}  # of those modes


def load(logdir):
    batch = {key: torch.from_numpy(value) for key, value in np.load(logdir / "batch.npz").items()}
    return dreamer.load_agent(logdir, "cpu").agent, batch, json.loads((logdir / "expected.json").read_text())


def unchanged(logdir, numbers):
    """Return {name: number} under today's names, without what changed on purpose."""
    today = {name.replace(GONE, "expl_behavior."): number for name, number in numbers.items()}
    return {name: number for name, number in today.items() if not name.startswith(CHANGED.get(logdir.name, "-"))}


@every_logdir
def test_the_numbers_are_those_of_the_version_that_wrote_it(logdir):
    agent, batch, expected = load(logdir)
    state = agent.world.rssm.initial(2, "cpu").map(torch.Tensor.detach)
    torch.manual_seed(0)
    losses, _, _ = agent.loss(batch, state)
    means = {name: loss.detach().mean().item() for name, loss in losses.items()}
    theirs = unchanged(logdir, expected["losses"])
    assert unchanged(logdir, means) == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    agent.opt.zero_grad()
    agent.total(losses).backward()
    theirs = unchanged(logdir, expected["gradient_norms"])
    params = {name: param for name, param in agent.nets.named_parameters() if param.grad is not None}
    ours = unchanged(logdir, {name: param.grad.norm().item() for name, param in params.items()})
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    agent.opt.step()  # with the moments of before
    theirs = unchanged(logdir, expected["parameter_sums_after_a_step"])
    ours = {name: param.detach().double().sum().item() for name, param in agent.nets.named_parameters()}
    assert unchanged(logdir, ours) == pytest.approx(theirs, rel=1e-5, abs=1e-5)

    torch.manual_seed(1)
    agent.generators["act"] = torch.default_generator
    carry = agent.initial(2)
    for time, mode in enumerate(("sample", "mode")):
        actions, carry, _ = agent.act({key: value[:, time].numpy() for key, value in batch.items()}, carry, mode)
        for key, value in expected["actions"][time].items() if mode not in OTHER_ACTIONS.get(logdir.name, ()) else ():
            np.testing.assert_allclose(actions[key], value, rtol=1e-4, atol=1e-5)


@every_logdir
def test_it_goes_on_evaluates_and_films(logdir, tmp_path, capfd):
    run = shutil.copytree(logdir, tmp_path / "run")
    words = ["--config", str(run / "config.yaml"), "--logdir", str(run)]
    assert dreamer.main([*words, "--script", "eval_only"]) == 0, capfd.readouterr().err
    assert dreamer.main([*words, "--steps", "70"]) == 0, capfd.readouterr().err
    saved = torch.load(run / "latest.pt", weights_only=True)
    assert saved["counters"]["agent_steps"] == 70 and saved["counters"]["updates"] == 12 + 3
    assert "skipped" not in capfd.readouterr().err
    assert (
        inference_video.main(["--checkpoint", str(logdir), "--episodes", "1", "--output", str(tmp_path / "films")]) == 0
    )
    assert len(list((tmp_path / "films").glob("*.mp4"))) == 1


@pytest.mark.parametrize("name", ["dreamerv1", "dreamerv2", "planet"])
def test_todays_preset_goes_on_from_an_older_checkpoint(name):
    """Its Adam has TensorFlow's form, and the moments of PyTorch's; a bias that was not there starts at zero."""
    (logdir,) = (path for path in LOGDIRS if path.name == name)
    agent, batch, _ = load(logdir)
    config = load_config(["--config", str(logdir / "config.yaml"), "--optimizer", "tf_adam"], CONFIGS)
    config = config.replace(**{"rssm.cell": "norm_gru_bias"} if name == "dreamerv2" else {})
    today = make_agent(config, agent.obs_spec, agent.act_spec)
    today.load_state_dict(torch.load(logdir / "latest.pt", weights_only=True)["agent"])
    before, params = agent.opt.state_dict()["moments"], dict(today.nets.named_parameters())
    after = today.opt.state_dict()["moments"]
    new = {name for name in params if name == "world.rssm.cell.gru.linear.bias"}
    assert after.keys() == before.keys() - new and bool(new) == (name == "dreamerv2")
    for key, moments in before.items():
        assert all(torch.equal(value, after[key][moment]) for moment, value in moments.items())
    assert not any(params[key].any() for key in new)
    state = today.world.rssm.initial(2, "cpu").map(torch.Tensor.detach)
    assert today.update(batch, state)[1]["loss"].isfinite()
    moments = today.opt.state_dict()["moments"]
    counts = {key: float(moments[key]["step"]) for key in moments}
    assert all(count == (1 if key in new else float(before[key]["step"]) + 1) for key, count in counts.items())


def test_its_configuration_names_the_behavior_that_its_keys_meant():
    found = {path.name: load_config(["--config", str(path / "config.yaml")], CONFIGS).behavior for path in LOGDIRS}
    assert found == {
        "dreamerv1": "dreamerv1",
        "dreamerv2": "dreamerv2",
        "dreamerv3": "actor_critic",
        "dreamerv3_2023": "dreamerv3_2023",
        "plan2explore": "actor_critic",
        "planet": "cem",
    }
