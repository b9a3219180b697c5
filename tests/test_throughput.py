"""The speed benchmark: numbers checked by hand, output, and errors. Times are not tested."""

import itertools
import json
import types

import pytest
import torch

from benchmarks import throughput, timing
from ops.layers import BlockLinear, Conv2d, Linear, MaxPool, Norm

DEBUG = "--configs debug --task dummy_vector"
KEYS = {"ms_per_update", "updates_per_s", "compile_s", "flops", "peak_gflops", "mfu", "peak_memory_mb"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Leave little to fill, to multiply and to repeat."""
    for name, value in {
        "HELD": 400,
        "EPISODE": 20,
        "PEAK": {"cpu": 64},
        "PEAK_SECONDS": 0.01,
        "REPEATS": 2,
        "ROTATION": 2,
    }.items():
        monkeypatch.setattr(timing, name, value)


def measure(folder, *words):
    """Return what a command line writes to its JSON file."""
    path = folder / "out.json"
    assert throughput.main([*words, "--json", str(path)]) == 0
    return json.loads(path.read_text())


# FLOPs


def forward_and_backward(layer, x):
    return timing.count_flops(lambda: layer(x).float().sum().backward())


@pytest.mark.parametrize(
    ("layer", "shape", "forward"),
    [
        (Linear(3, 5), (7, 3), 2 * 7 * 3 * 5),
        (BlockLinear(8, 12, 2), (7, 2, 4), 2 * 7 * 2 * 4 * 6),
        (Conv2d(3, 4, 5), (2, 8, 8, 3), 2 * (2 * 8 * 8) * 4 * (3 * 5 * 5)),
        (Norm(6), (7, 6), 0),
        (MaxPool.apply, (2, 8, 8, 3), 0),
    ],
)
def test_flops_of_a_layer_by_hand(layer, shape, forward):
    # Backward has two products of the forward one's size: for the gradient of the weights and for that of the input.
    assert forward_and_backward(layer, torch.ones(shape, requires_grad=True)) == 3 * forward


def test_an_input_without_gradient_costs_one_product_less():
    assert forward_and_backward(Linear(3, 5), torch.ones(7, 3)) == 2 * (2 * 7 * 3 * 5)


# Results


@pytest.mark.parametrize("version", ["planet", "dreamerv1", "dreamerv2", "dreamerv3_2023"])
def test_every_version_can_be_measured(version, tmp_path):
    words = f"--configs {version} debug --task dummy_vector --updates 2".split()
    result = measure(tmp_path, *words)
    assert result["flops"] > 0 and result["ms_per_update"]["median"] > 0


def test_a_result_and_its_loop(tmp_path, capsys):
    words = "--configs debug --size 16 16 --updates 2 --loop 30"
    result = measure(tmp_path, *words.split())
    assert set(result) >= KEYS | {"sample_ms", "refresh_ms", "act_ms", "loop", "device", "threads", "torch", "configs"}
    assert (result["precision"], result["compile"], result["task"]) == ("32", False, "dummy_multi")
    ms = result["ms_per_update"]
    assert set(ms) == {"median", "min", "max"}
    assert 0 < ms["min"] <= ms["median"] <= ms["max"]
    assert result["updates_per_s"] == pytest.approx(1000 / ms["median"])
    assert result["compile_s"] >= 0
    assert result["peak_gflops"] == max(result["peaks_gflops"]) > 0
    assert result["mfu"] == pytest.approx(result["flops"] / (ms["median"] / 1e3 * result["peak_gflops"] * 1e9))
    assert result["peak_memory_mb"] > 50  # PyTorch alone takes more
    assert set(result["act_ms"]) == {"1", "8", "16"}
    assert min(result["sample_ms"], result["refresh_ms"], *result["act_ms"].values()) > 0
    loop = result["loop"]
    assert loop.pop("fps") > 0
    assert set(loop) == {"act", "step", "sample", "update", "rest"}
    assert min(loop.values()) > 0  # 30 steps of dummy_multi, with an update at every fourth
    assert sum(loop.values()) == pytest.approx(1)
    out = capsys.readouterr().out
    assert f"{result['flops'] / 1e9:.1f} GFLOP" in out
    assert "frames/s: act" in out


def test_compared_settings_take_turns(tmp_path, monkeypatch, capsys):
    turns, update = [], timing.Subject.update

    def spy(subject):
        turns.append(subject.config.batch_size)
        update(subject)

    monkeypatch.setattr(timing.Subject, "update", spy)
    words = [*DEBUG.split(), "--updates", "3", "--compare", "--batch_size 2", "--batch_size 4"]
    result = measure(tmp_path, *words)
    assert turns == [2, 4] * (timing.WARMUP + 3)
    assert result["b"]["flops"] == 2 * result["a"]["flops"]  # every product grows with the batch
    ratio = result["ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert result["a"]["peak_memory_mb"] is None  # both share one process, so it cannot be attributed

    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, name in zip(files, "ab", strict=True):
        file.write_text(json.dumps(result[name]))
    capsys.readouterr()
    assert throughput.main(["--compare", *map(str, files)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("flops "))
    assert row.split()[-1] == "0.500"


def test_nested_calls_count_once(monkeypatch):
    owner = types.SimpleNamespace(inner=lambda: 1)
    owner.outer = lambda: owner.inner() + 1
    timers = timing.Timers(torch.device("cpu"))
    timers.watch("act", owner, "outer")
    timers.watch("sample", owner, "inner")
    monkeypatch.setattr(timing.time, "perf_counter", itertools.count().__next__)  # a second for every look
    assert (owner.outer(), owner.inner(), owner.inner()) == (2, 1, 1)
    assert timers.totals == {"act": 1, "step": 0, "sample": 2, "update": 0}


def test_a_profile_names_operators(tmp_path, capsys):
    assert "aten::addmm" in measure(tmp_path, *DEBUG.split(), "--profile")["profile"]
    assert "aten::addmm" in capsys.readouterr().out


# Sweeps


def test_a_sweep_and_its_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(throughput, "measure_alone", lambda words: measure(tmp_path, *words))  # in this process
    words = [*DEBUG.split(), "--updates", "1", "--sweep", "size=debug", "--sweep", "batch_length=8,16"]
    monkeypatch.setattr(throughput, "report", lambda result: None)
    results = measure(tmp_path, *words, "--plot", str(tmp_path / "plot.png"))
    assert [(result["sweep"], result["value"]) for result in results] == [
        ("size", "debug"),
        ("batch_length", "8"),
        ("batch_length", "16"),
    ]
    assert [result["batch_length"] for result in results] == [8, 8, 16]
    assert results[0]["configs"] == ["debug", "debug"]
    assert len(capsys.readouterr().out.splitlines()) == 4  # a row for each below the heads
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_of_its_own():
    result = throughput.measure_alone([*DEBUG.split(), "--updates", "1"])
    assert result["ms_per_update"]["median"] > 0


# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--bogus 1", "--bogus: unknown key"),
        ("--configs debgu", "did you mean debug"),
        ("--updates 0", "--updates: expected at least 1"),
        ("--updates many", "--updates: invalid int value: 'many'"),
        ("--loop -1", "--loop: expected at least 0"),
        ("--plot out.png", "--plot needs a --sweep"),
        ("--sweep batch_size", "expected KEY=VALUE,VALUE"),
        ("--sweep batch_size=2,two", "batch_size: expected a whole number, got 'two'"),
        ("--sweep batch_size=2 --profile", "--sweep and --profile do not go together"),
        ("--json nowhere/out.json", "no such directory"),
        ("--compare nowhere.json nothing.json", "nowhere.json: No such file or directory"),
        ("--configs debug --agent random", "--agent random: there is no update to time"),
        ("--configs debug --task custom_nowhere:Env", "'nowhere' cannot be imported"),
    ],
)
def test_a_mistake_is_one_line(words, message, capsys):
    assert throughput.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("throughput.py: ") and message in err and err.count("\n") == 1
