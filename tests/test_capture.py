"""Requirements of CUDA graphs on an update, as far as they can be checked without a GPU."""

import contextlib
import functools
import gc
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from agents.dreamer import no_graphs
from ops import graphs
from ops.graphs import WARMUP, Captured, Graphs
from rssm import State
from tests.factories import Watch, act, initial, make_agent, make_batch, make_config, make_obs
from tools import UserError

VERSIONS = {
    "dreamerv3": (),
    "dreamerv3_2023": ("--configs", "dreamerv3_2023", "debug"),
    "dreamerv2": ("--configs", "dreamerv2", "debug"),
    "dreamerv1": ("--configs", "dreamerv1", "debug"),
    "planet": ("--configs", "planet", "debug"),
    "ppo": ("--behavior", "ppo"),
    "hierarchical": ("--configs", "hierarchical", "debug", "--expl_behavior", "plan2explore"),
    "plan2explore": ("--expl_behavior", "plan2explore", "--expl_noise", "0.1"),
    "explorers": ("--expl_behavior", "icm", "--intrinsic", "icm,rnd,empowerment", "--expl_critics", "separate"),
}


def stand_in(function, generator):
    """Replace `record_cuda`, which needs a GPU: call the Python function again instead of replaying a recording."""
    recorded.append(function)
    results = {key: value.clone() for key, value in function().items()}

    def replay():
        for key, value in function().items():
            results[key].copy_(value)

    return replay, results


recorded = []


def test_the_fourth_call_records_and_later_ones_replay():
    recorded.clear()
    called = []

    def double(batch, state):
        called.append(batch["x"])
        return {"y": 2 * batch["x"] + state.deter}

    captured = Captured(double, record=stand_in)
    results = []
    for number in range(WARMUP + 3):
        batch = {"x": torch.full((2,), float(number))}
        results.append(captured(batch, State(torch.ones(2), torch.zeros(2)))["y"])
        assert len(recorded) == (number >= WARMUP)
    assert len({x.data_ptr() for x in called}) == 1  # a recording knows its own memory only, as the warm-up does
    assert [y.tolist() for y in results] == [[2 * n + 1.0] * 2 for n in range(WARMUP + 3)]  # each of its own memory
    with pytest.raises(AssertionError, match="inputs changed"):
        captured({"x": torch.zeros(3)}, State(torch.ones(3), torch.zeros(3)))


def test_the_recording_compiles_nothing_anew():
    """Inductor times kernels when a function is compiled, which cannot be recorded."""
    compiled = []

    def backend(graph, example):
        compiled.append(len(example))
        return graph.forward

    function = torch.compile(lambda batch: {"y": batch["x"] + 1}, backend=backend, dynamic=False)
    captured = Captured(function, record=stand_in)
    for number in range(WARMUP + 2):
        window = torch.full((2, 4, 3), float(number))[:, 1:]  # as one without its context step, in a larger tensor
        assert captured({"x": window})["y"].equal(window + 1)
    assert len(compiled) == 1


def test_what_cannot_be_recorded_is_one_warning_and_the_run_goes_on_as_it_is_written(capsys):
    said, calls = [], []

    def fails(function, generator):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    together = Graphs(said.append)
    one, other = (Captured(lambda x: calls.append(x) or {"y": x + 1}, record=fails, graphs=together) for _ in range(2))
    for number in range(WARMUP + 3):
        for captured in (one, other):
            assert captured(torch.tensor(float(number)))["y"] == number + 1
    assert len(calls) == 2 * (WARMUP + 3)  # each call once, the one whose recording failed included
    assert len(said) == 1 and "\n" not in said[0] and "operation not permitted when" in said[0]
    strict = Graphs(functools.partial(no_graphs, make_config("--graphs", "true")))
    captured = Captured(lambda x: {"y": x}, record=fails, graphs=strict)
    with pytest.raises(UserError, match=r"--graphs true: .*not permitted.*--graphs false"):
        [captured(torch.zeros(())) for _ in range(WARMUP + 1)]
    no_graphs(make_config(), "it cannot be recorded")
    (line,) = capsys.readouterr().err.splitlines()
    assert "warning: it cannot be recorded; the run goes on without" in line


def test_a_graph_that_does_nothing_when_it_is_launched_is_found_at_once():
    """As one whose stream is on another device than its tensors: they run at once, and the graph stays empty."""
    said, total = [], torch.zeros(())
    empty = lambda function, generator: (lambda: None, function())  # noqa: E731
    captured = Captured(lambda x: {"total": total.add_(x).clone()}, record=empty, graphs=Graphs(said.append))
    seen = [float(captured(torch.ones(()))["total"]) for _ in range(WARMUP + 3)]
    assert len(said) == 1 and "does nothing" in said[0]
    assert [later - now for now, later in itertools.pairwise(seen)] == [1, 1, 2, 1, 1]  # none was left out


class Card:
    """Stands in for torch.cuda where there is no GPU: notes what is asked of streams and graphs, and runs nothing."""

    def __init__(self, monkeypatch, current=1):
        self.notes, self.now = [], SimpleNamespace(name="main", device=torch.device("cuda", current))
        self.now.wait_stream = lambda other: self.notes.append(f"main waits for {other.name}")
        graphs.side_stream.cache_clear()
        for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(graphs.allocator, name, lambda *args, name=name: self.notes.append((name, *args)))

    def Stream(self, device):
        stream = SimpleNamespace(name=f"side of {device}", device=device)
        stream.wait_stream = lambda other: self.notes.append(f"side waits for {other.name}")
        return stream

    def current_stream(self, device=None):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def CUDAGraph(self):
        note = lambda what: lambda *args: self.notes.append(what)  # noqa: E731
        return SimpleNamespace(replay=note("replay"), register_generator_state=note("register"))

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.notes.append(f"record on {stream.name}, {capture_error_mode}")
        self.now = stream
        yield  # an error leaves the stream as it is, as in PyTorch
        self.notes.append("recorded")


def test_warm_up_and_recording_take_one_side_stream_of_the_current_device(monkeypatch):
    card = Card(monkeypatch)
    with FakeTensorMode():
        captured = Captured(lambda x: {"y": x + 1, "stream": torch.tensor(0)})
        x = torch.zeros(2, device="cuda:1")
        captured.take = lambda values, structure: setattr(captured, "arguments", values)  # which copies to the GPU
        for _ in range(WARMUP):
            captured(x)
        results = {"y": torch.zeros(2, device="cuda:1")}
    around = ["side waits for main", "main waits for side of cuda:1"]
    assert card.notes == around * WARMUP
    card.notes.clear()
    seen = []

    def function():
        seen.append((card.now.name, gc.isenabled()))
        return results

    replay, same = graphs.record_cuda(function, generator=torch.Generator())
    assert same is results and seen == [("side of cuda:1", False)] and gc.isenabled()
    assert card.notes == ["register", around[0], "record on side of cuda:1, thread_local", "recorded", around[1]]
    replay()
    assert card.notes[-1] == "replay"


def test_a_recording_that_fails_leaves_stream_garbage_collector_and_generator_as_they_were(monkeypatch):
    card = Card(monkeypatch)
    # A CUDA generator that takes part in a recording draws only there, until it is given another state.
    generator = SimpleNamespace(clone_state=lambda: "as before", graphsafe_set_state=card.notes.append)
    with pytest.raises(RuntimeError, match="capturing"):
        graphs.record_cuda(lambda: (_ for _ in ()).throw(RuntimeError("not while capturing")), generator)
    *notes, restored, ended, released = card.notes
    assert restored == "as before"
    assert ended == ("_cuda_endAllocateToPool", 1, "pool") and released == ("_cuda_releasePool", 1, "pool")
    assert card.now.name == "main" and gc.isenabled()
    assert notes[-1] == "main waits for side of cuda:1"
    with pytest.raises(RuntimeError, match="does not lie on the GPU"):
        graphs.record_cuda(lambda: {"count": torch.zeros(())})


def state_of(agent):
    """Return all tensors that outlive an update: parameters, buffers, the optimizer's."""
    tensors = dict(agent.nets.named_parameters()) | dict(agent.nets.named_buffers())
    opt = agent.opt
    if hasattr(opt, "flat"):
        return tensors | {name: getattr(opt, name) for name in ("flat", "grad", "nu", "mu", "count")}
    states = [adam.state[param] for adam in opt.adams.values() for param in adam.state]
    return tensors | {f"adam {i} {key}": value for i, state in enumerate(states) for key, value in state.items()}


@pytest.mark.parametrize("version, kind", [*itertools.product(VERSIONS, ["proprio", "pixels"]), ("dreamerv3", "told")])
def test_an_update_and_acting_are_fit_to_be_recorded(version, kind, monkeypatch):
    flags = VERSIONS[version]
    if kind == "pixels" and "debug" in flags:
        flags = (*flags, "--encoder.cnn", "same", "--decoder.cnn", "same")  # these images are not 64x64
    agent, batch = make_agent(kind, *flags), make_batch(kind)
    state = initial(agent)
    assert not any(leaf.requires_grad for leaf in tree_leaves(agent.initial(2)))  # nor is its node kept from then on
    agent.update(batch, state)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)  # the form of it that can be recorded needs a GPU
    places = {name: tensor.data_ptr() for name, tensor in state_of(agent).items()}
    with Watch() as watch:
        agent.update(batch, state)
        _, carry = act(agent, make_obs(kind), mode="explore")
        for mode in ("noisy", "sample", "mode"):
            agent.act(make_obs(kind), carry, mode)
    assert watch.found == []
    assert {name: tensor.data_ptr() for name, tensor in state_of(agent).items()} == places
