"""Test export.py: the step that it writes is the agent's, and runs where there is no PyTorch."""

import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import dreamer
import export
from agents.acting import ActingStep, draw, make_decoder
from agents.policy import load_policy
from tests.factories import KINDS, ROOT, VERSIONS, family_agent, make_agent, make_batch, observations, shake
from tools import UserError

ELSEWHERE = """
import sys
import numpy as np, onnxruntime
folder = sys.argv[1]
given, model = dict(np.load(folder + "/inputs.npz")), onnxruntime.InferenceSession(folder + "/agent.onnx")
names = [value.name for value in model.get_outputs()]
carry = {key: given.pop(key) for key in list(given) if key.startswith("carry.")}
told = {name: [] for name in names}
for step in range(len(given["is_first"])):
    outs = dict(zip(names, model.run(names, {**carry, **{key: value[step] for key, value in given.items()}})))
    carry = {key: outs[key.replace("carry.", "next.")] for key in carry}
    for name in names:
        told[name].append(outs[name])
assert "torch" not in sys.modules and "agents" not in sys.modules
np.savez(folder + "/outputs.npz", **told)
"""


def train(logdir, words):
    argv = ["--logdir", str(logdir), "--eval_episode_num", "0", "--log_level", "error", *words.split()]
    assert dreamer.main(argv) == 0
    return logdir


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "cartpole"
    return train(path, "--configs debug --task gym_CartPole-v1 --steps 60")


def make_step(agent, mode, native=None):
    return ActingStep(agent, mode, {key: make_decoder(agent.act_spec, key, native) for key in agent.act_spec.widths})


def test_an_exported_agent_acts_elsewhere_as_it_does_here(tmp_path, capsys):
    logdir = train(tmp_path / "run", "--configs dreamerv2 debug --steps 60")
    argv = ["--checkpoint", str(logdir), "--mode", "sample", "--out", str(tmp_path)]
    assert export.main(argv) == 0
    assert re.search(r"a step takes [\d.]+ ms in ONNX Runtime", capsys.readouterr().out)
    policy = load_policy(logdir, "cpu", precision="32")
    step, generator = make_step(policy.agent, "sample", policy.converter.native), torch.Generator().manual_seed(1)
    carry = step.start(1)
    given = {name: value.numpy() for name, value in carry.items() if name.startswith("carry.")}
    stream, ours = [], []
    for index in range(500):
        inputs = export.random_obs(step, 1, generator) | step.noise(1, generator)
        inputs["is_first"] = torch.tensor([index % 100 == 0])
        stream.append(inputs)
        with torch.no_grad():
            ours.append(step(carry | inputs))
        carry = step.carry_of(ours[-1])
    given |= {name: np.stack([inputs[name].numpy() for inputs in stream]) for name in stream[0]}
    np.savez(tmp_path / "inputs.npz", **given)
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(tmp_path)], check=True, cwd=tmp_path)
    theirs = np.load(tmp_path / "outputs.npz")
    assert set(theirs) == set(step.outputs)
    for name in step.outputs:
        here = np.stack([outs[name].numpy() for outs in ours])
        assert here.dtype == theirs[name].dtype and np.abs(here - theirs[name]).max() < 1e-4, name
    assert theirs["action.mode"].max() == 2 and theirs["action.move"].min() < 0

    about = json.loads((tmp_path / "agent.json").read_text())
    assert [noise["distribution"] for noise in about["noise"]] == ["uniform in [0, 1)"] * 3
    assert about["observations"]["image"]["own"]["high"] == 255 and about["actions"]["mode"]["own"]["n"] == 3
    assert about["largest_difference"] < 1e-4 and about["latency_ms"] > 0


def test_the_documented_loop_plays_cartpole_without_pytorch(cartpole):
    assert export.main(["--checkpoint", str(cartpole)]) == 0
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    code = code.replace("logdir/quickstart", str(cartpole)) + '\nimport sys\nassert "torch" not in sys.modules'
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cartpole, check=True)
    assert float(done.stdout.removeprefix("score")) >= 8


def test_a_torch_program_has_the_same_names_and_numbers(cartpole, tmp_path):
    assert export.main(["--checkpoint", str(cartpole), "--format", "torch", "--out", str(tmp_path)]) == 0
    step = make_step(load_policy(cartpole, "cpu", precision="32").agent, "mode")
    outs = torch.export.load(tmp_path / "agent.pt2").module()(step.start(1))
    assert list(outs) == step.outputs and outs["action.action"].dtype == torch.int64
    torch.testing.assert_close(outs["next.deter"], step(step.start(1))["next.deter"])
    assert {path.name for path in tmp_path.iterdir()} == {"agent.pt2", "agent.json"}


@pytest.mark.parametrize("version", [name for name in VERSIONS if name != "planet"])
@pytest.mark.parametrize("mode", ["mode", "sample"])
def test_the_step_is_what_the_agent_does_by_the_same_noise(version, mode):
    agent = family_agent(version, "proprio")
    step, generator = make_step(agent, mode), torch.Generator().manual_seed(3)
    obs = observations("proprio", is_first=True)
    noise = step.noise(3, generator)
    inputs = step.start(3) | {f"obs.{key}": torch.from_numpy(obs[key]) for key in agent.obs_spec} | noise
    outs = step(inputs)
    if mode == "sample":
        from ops.random import drawing_from

        feed = iter(noise.values())
        with torch.no_grad(), drawing_from(lambda kind, shape: next(feed)):
            tensors = {key: torch.from_numpy(value) for key, value in obs.items()}
            carry = agent.choose(tensors, agent.initial(3), mode)
        assert torch.equal(carry.state.stoch, outs["next.stoch"]) and torch.equal(carry.action, outs["next.action"])
    else:
        again = step({**inputs, "is_first": torch.zeros(3, dtype=torch.bool)})
        assert torch.equal(outs["next.action"], step(inputs)["next.action"])
        assert torch.equal(again["next.deter"], outs["next.deter"]) or "2023" in version  # the carry starts there
    assert (outs["action.action"].abs() <= 1).all()


def test_a_file_may_be_for_several_environments():
    step = make_step(shake(make_agent("mixed")), "sample")
    _, program = export.trace(step, 3)
    outs = program.module()(export.example(step, 3))
    assert {len(value) for value in outs.values()} == {3}


def test_an_encoder_that_reads_and_hears_is_exported():
    encoder, batch = make_agent("told", "--audio.mel", "4", "--audio.window", "16").world.encoder, make_batch("told")
    given, step = encoder.prepare({key: batch[key] for key in KINDS["told"][0]}), Encoding(encoder)
    with torch.no_grad():
        program = torch.export.export(step, (given,), strict=False)
        torch.testing.assert_close(program.module()(given), step(given))


class Encoding(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, obs):
        return self.encoder(obs, torch.float32)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_what_onnx_lacks_is_computed_to_six_digits(kind):
    x = draw(kind, (1000,), torch.Generator().manual_seed(0))
    if kind == "normal":
        exact = torch.special.ndtr(2 * x.double()).float()  # in single precision its tail is 0
        torch.testing.assert_close(export.ndtr(2 * x), exact, rtol=1e-5, atol=0)
    p = torch.cat([x[(x > 0) & (x < 1)], torch.tensor([1e-6, 1e-3, 0.5, 0.999])])
    torch.testing.assert_close(export.ndtri(p), torch.special.ndtri(p), rtol=1e-5, atol=2e-6)


def test_what_has_no_policy_and_what_is_missing_is_said_in_one_line(tmp_path, cartpole, capsys, monkeypatch):
    old = pathlib.Path(__file__).parent / "data" / "logdirs" / "planet"
    cases = [
        ([str(old), "--format", "torch"], "plans in its world model"),
        ([str(tmp_path / "nowhere"), "--format", "torch"], "no such file"),
        ([str(cartpole), "--batch", "0"], "--batch"),
    ]
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    cases.append(([str(cartpole)], "pip install -r requirements/export.txt"))
    for words, said in cases:
        assert export.main(["--checkpoint", *words, "--out", str(tmp_path / "out")]) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("export.py: ") and said in line, line
    assert not (tmp_path / "out").exists()


def test_an_action_that_is_not_affine_is_refused():
    agent = make_agent("proprio")
    with pytest.raises(UserError, match="action action: how it becomes"):
        make_decoder(agent.act_spec, "action", lambda parts: {"action": parts["action"] ** 3})
