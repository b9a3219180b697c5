"""Logdirs of an older version of this project: one for each version of Dreamer, and one with an explorer.

Each has a batch and the results that its version computed from it: losses, gradients, parameters after a step,
actions.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch

import dreamer
import inference_video
from training.config import CONFIGS, load_config

LOGDIRS = sorted((pathlib.Path(__file__).parent / "data" / "logdirs").iterdir())
every_logdir = pytest.mark.parametrize("logdir", LOGDIRS, ids=lambda path: path.name)
GONE = "explorer.behavior."  # a name that is now expl_behavior.


def load(logdir):
    batch = {key: torch.from_numpy(value) for key, value in np.load(logdir / "batch.npz").items()}
    return dreamer.load_agent(logdir, "cpu").agent, batch, json.loads((logdir / "expected.json").read_text())


@every_logdir
def test_the_numbers_are_those_of_the_version_that_wrote_it(logdir):
    agent, batch, expected = load(logdir)
    state = agent.world.rssm.initial(2, "cpu").map(torch.Tensor.detach)
    torch.manual_seed(0)
    losses, _, _ = agent.loss(batch, state)
    assert {name: loss.detach().mean().item() for name, loss in losses.items()} == pytest.approx(
        expected["losses"], rel=1e-5, abs=1e-6
    )
    agent.opt.zero_grad()
    agent.total(losses).backward()
    norms = {name.replace(GONE, "expl_behavior."): norm for name, norm in expected["gradient_norms"].items()}
    params = {name: param for name, param in agent.nets.named_parameters() if param.grad is not None}
    ours = {name: param.grad.norm().item() for name, param in params.items()}
    assert ours == pytest.approx(norms, rel=1e-4, abs=1e-6)
    agent.opt.step()  # with the moments of before
    sums = {name.replace(GONE, "expl_behavior."): s for name, s in expected["parameter_sums_after_a_step"].items()}
    ours = {name: param.detach().double().sum().item() for name, param in agent.nets.named_parameters()}
    assert ours == pytest.approx(sums, rel=1e-5, abs=1e-5)

    torch.manual_seed(1)
    agent.generators["act"] = torch.default_generator
    carry = agent.initial(2)
    for time, mode in enumerate(("sample", "mode")):
        actions, carry, _ = agent.act({key: value[:, time].numpy() for key, value in batch.items()}, carry, mode)
        for key, value in expected["actions"][time].items():
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
