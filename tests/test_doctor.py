"""doctor.py: what it tells of this machine, and that it finds what is wrong."""

import pytest
import torch

import doctor
from tests.factories import ROOT
from training import commands
from training.config import CONFIGS, load_config

SMALL = ("--configs", "debug", "--task", "dummy_vector", "--compile", "false")


@pytest.fixture
def small(monkeypatch):
    """Return the configuration of tiny sizes, which is not compiled."""
    monkeypatch.setattr(doctor.timing, "REPEATS", 2)
    monkeypatch.setattr(doctor.timing, "PEAK_SECONDS", 0.01)
    monkeypatch.setattr(doctor.timing, "PEAK", {"cpu": 64})
    return load_config([*SMALL, "--log_level", "error"], CONFIGS).replace(**doctor.QUIET)


def test_on_a_cpu_it_checks_what_it_can_and_says_what_it_cannot(small, monkeypatch, capsys):
    monkeypatch.setattr(commands, "CHECKED", SMALL)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "egl_displays", list)
    monkeypatch.setattr(doctor.machine, "DRIVER", ROOT / "no such file")
    monkeypatch.setattr(doctor.machine, "prepare", lambda config: torch.device("cpu"))  # as it is for this process
    monkeypatch.setitem(doctor.CHECKS, "speed", lambda config: doctor.speed(config, updates=1))
    assert doctor.main(["--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = {line[13:].partition(":")[0]: line for line in lines[: len(doctor.CHECKS)]}
    assert list(told) == list(doctor.CHECKS)
    assert f"torch {torch.__version__.partition('+')[0]}" in told["packages"]
    assert told["device"] == "ok           device: cpu, float32"
    assert told["as written"].startswith("ok") and "differ by 0.0e+00" in told["as written"]
    assert "ms an update" in told["speed"] and "compile false, graphs false" in told["speed"]
    unchecked = [name for name, line in told.items() if line.startswith("not checked")]
    graphs = ["compiled", "captured", "compiled and captured", "by --ops.scan triton"]
    assert unchecked == ["driver", "GPUs", *graphs, "EGL"]
    assert "this is the CPU" in told["captured"]
    block = lines[lines.index("```") :]
    assert block == ["```", "doctor.py --seed 3", *lines[: len(doctor.CHECKS)], "```"]


def test_what_is_wrong_is_found_and_the_block_has_its_traceback(small, monkeypatch):
    results = doctor.results

    def wrong(config, updates):
        found = results(config, updates)
        found["policy_loss"] += config.compile
        return found

    def broken(config):
        return [].pop()

    monkeypatch.setattr(doctor, "results", wrong)
    monkeypatch.setattr(
        doctor, "make_agent", lambda config, *specs: doctor_agent(config.replace(compile=False), *specs)
    )
    checks = {"compiled": lambda config: doctor.compared(config, compile=True), "broken": broken}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    lines, traces = doctor.examine(small, lambda line: None)
    assert lines[0].startswith("FAILED       compiled: ValueError") and "in policy_loss" in lines[0]
    assert lines[1] == "FAILED       broken: IndexError: pop from empty list"
    assert len(traces) == 2 and "in broken" in traces[1]


doctor_agent = doctor.make_agent


def test_numbers_that_are_none_differ():
    zero, none = {"a": torch.zeros(2), "b": torch.ones(1)}, {"a": torch.zeros(2), "b": torch.full((1,), torch.nan)}
    name, worst = doctor.difference(zero, none)
    assert name == "b" and not worst <= doctor.TOLERANCE
    with pytest.raises(ValueError, match="has no b"):
        doctor.difference(zero, {"a": torch.zeros(2)})


def test_a_wrong_flag_is_one_line(capsys):
    assert doctor.main(["--devise", "cpu"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and line.startswith("doctor.py: ") and "devise" in line
