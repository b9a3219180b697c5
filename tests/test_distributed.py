"""Several ranks share a run: what they compute is that of one process, and they begin, save, stop and fail together."""

import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dreamer
from agents.dreamer import Dreamer
from benchmarks.distributed import CASES, compare
from ops import collectives
from replay.dealing import deal
from replay.sampling import Replay
from tests.test_run import FORK, checkpoint, command, lines
from tools import UserError
from training.config import CONFIGS, load_config
from training.distributed import check_own_devices, joined

WORDS = "--task dummy_vector --envs 2 --eval_episode_num 0"


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def ranks(target, *args, count=2):
    """Call `target(rank, *args)` in processes that find each other as if torchrun had started them; exit statuses."""
    port = free_port()
    processes = [FORK.Process(target=_rank, args=(rank, count, port, target, args)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    return [process.exitcode for process in processes]


def _rank(rank, count, port, target, args):
    names = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
    os.environ.update(zip(names, map(str, (rank, rank, count, count, "127.0.0.1", port)), strict=True))
    os.setsid()
    torch.set_num_threads(1)
    target(rank, *args)


def run(rank, logdir, words, at=None, number=0):
    """Run dreamer.py; in its learn call `at` the second rank gets a signal."""
    os.dup2(os.open(logdir.with_suffix(f".{rank}.err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    learn, calls = Dreamer.learn, []

    def counted(agent, replay):
        calls.append(1)
        if rank == 1 and len(calls) == at:
            os.kill(os.getpid(), number)
        return learn(agent, replay)

    Dreamer.learn = counted
    sys.exit(dreamer.main(command(logdir, words)))


def errors(logdir, rank):
    return logdir.with_suffix(f".{rank}.err").read_text()


def two(logdir, words, *args):
    return ranks(run, logdir, words, *args)


# ---------------------------------------------------------------------------
# What is learned


def write_comparison(rank, path):
    config = load_config(["--device", "cpu"], CONFIGS)
    with joined(config, collectives.start):
        found = [compare(CASES[name], rank, 2, updates=2) for name in ("dreamerv2", "plan2explore", "icm and rnd")]
    torch.save(found, f"{path}/{rank}.pt")


def test_two_ranks_with_half_a_batch_each_are_one_process(tmp_path):
    assert ranks(write_comparison, tmp_path) == [0, 0]
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert found["gradient"] < 1e-5 and found["change"] < 1e-3 and found["metric"] < 1e-4
            assert found["equal"]


# ---------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Return the logdir of a run on two ranks that ended when the second of them got SIGTERM."""
    logdir = tmp_path_factory.mktemp("ranks") / "run"
    assert two(logdir, f"{WORDS} --steps 100", 5, signal.SIGTERM) == [128 + signal.SIGTERM] * 2
    return logdir


def test_a_signal_to_one_rank_stops_all_at_one_update_with_a_checkpoint(stopped):
    saved = checkpoint(stopped)
    updates = saved["counters"]["updates"]
    assert updates == 5 and saved["ranks"] == 2
    states = [torch.load(stopped / f"replay-{updates}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(list(stopped.glob("replay-*.pt"))) == 2
    assert all(len(state["streams"]) == 1 and state["streams"][0]["stop"] > 20 for state in states)
    first, second = (state["generators"]["random"]["state"] for state in states)
    assert first != second  # the ranks explore differently
    files = {name for state in states for stream in state["streams"] for name, _ in stream["episodes"]}
    assert files == {path.name for path in (stopped / "train_eps").iterdir()}
    assert errors(stopped, 1) == "" and "Traceback" not in errors(stopped, 0)  # the first speaks for all


def test_the_ranks_have_the_environments_of_one_process(stopped, tmp_path):
    assert dreamer.main(command(tmp_path / "run", f"{WORDS} --steps 40")) == 0
    begin = [sorted(starts(logdir)) for logdir in (stopped, tmp_path / "run")]
    assert begin[0][:2] == begin[1][:2]  # the first observations of two environments with two seeds


def starts(logdir):
    found = []
    for path in sorted((logdir / "train_eps").iterdir()):
        with np.load(path) as file:
            found.append(file["state"][0].tolist())
    return found[:2]


def test_a_run_goes_on_with_one_rank_and_with_two_and_the_ratio_stays_exact(stopped, tmp_path):
    for name in ("one", "two"):
        subprocess.run(["cp", "-r", stopped, tmp_path / name], check=True)
    assert dreamer.main(command(tmp_path / "one", f"{WORDS} --steps 110")) == 0
    assert two(tmp_path / "two", f"{WORDS} --steps 110") == [0, 0]
    for name in ("one", "two"):
        saved = checkpoint(tmp_path / name)
        assert saved["counters"]["agent_steps"] == 110
        assert saved["counters"]["updates"] == (110 - 40) * 8 // (4 * 8)
        assert saved["counters"]["episodes"] == 4  # of 20 steps: one in each environment, then another in each
    assert (tmp_path / "one" / f"replay-{saved['counters']['updates']}.pt").exists()
    scores = [line["step"] for line in lines(tmp_path / "two" / "scores.jsonl") if line["mode"] == "train"]
    assert len(scores) == 4  # of both ranks
    last = [line for line in lines(tmp_path / "two" / "metrics.jsonl") if "replay_steps" in line][-1]
    assert last["replay_steps"] >= 100


def test_a_rank_that_is_killed_ends_the_others_in_a_line(stopped, tmp_path):
    subprocess.run(["cp", "-r", stopped, tmp_path / "run"], check=True)
    assert two(tmp_path / "run", f"{WORDS} --steps 200", 3, signal.SIGKILL) == [1, -signal.SIGKILL]
    told = [line for line in errors(tmp_path / "run", 0).splitlines() if line.startswith("dreamer.py")]
    path = tmp_path / "run" / "latest.pt"
    assert told == [f"dreamer.py: another rank of the run is gone; the last good checkpoint is {path}"]


def test_what_a_rank_cannot_do_is_said_once_and_ends_all(stopped, tmp_path):
    subprocess.run(["cp", "-r", stopped, tmp_path / "run"], check=True)
    words = f"{WORDS} --seed 1 --steps 200"
    assert two(tmp_path / "run", words) == [2, 1]  # only the first looks at the run before
    assert two(tmp_path / "new", f"{words} --env_timeout 10 --task dummy_multi --size 16 15") == [2, 2]
    assert [len(errors(tmp_path / "new", rank).splitlines()) for rank in range(2)] == [1, 0]


def test_torchrun_starts_a_run(tmp_path):
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    words = f"{WORDS.replace('--eval_episode_num 0', '')} --steps 60"
    done = subprocess.run(
        [*argv, "dreamer.py", *command(tmp_path / "run", words)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "ranks    2, which share batch" in done.stderr
    assert checkpoint(tmp_path / "run")["counters"]["agent_steps"] == 60
    assert sum(line["mode"] == "eval" for line in lines(tmp_path / "run" / "scores.jsonl")) == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--envs 3 --batch_size 4", "--envs 3 cannot be shared by 2 ranks: take 4, for all of them"),
        ("--envs 2 --batch_size 5", "--batch_size 5 cannot be shared by 2 ranks: take 4, for all of them"),
        ("--agent world_models --envs 2", "--agent world_models learns one stage after the other in one process"),
        ("--script eval_only --envs 2", "--script eval_only plays in one process"),
        ("--envs 2", "WORLD_SIZE is 2, but there is no MASTER_ADDR and no MASTER_PORT: start by torchrun"),
    ],
)
def test_what_ranks_cannot_share_is_one_line_of_the_first(tmp_path, monkeypatch, capfd, words, reason):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert dreamer.main(command(tmp_path / "run", words)) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == (rank == 0) and (rank or reason in err)
    assert not (tmp_path / "run").exists()


def test_one_process_imports_nothing_of_torch_distributed(tmp_path):
    value = torch.ones(3)
    assert collectives.gather(value) is value and collectives.mean(value) is value
    assert collectives.place() == () and collectives.average_metrics({"a": value}) == {"a": value}


# ---------------------------------------------------------------------------
# Dealing


LAYOUT = {"reward": ((), np.float32), "is_first": ((), bool), "is_last": ((), bool), "is_terminal": ((), bool)}
LATENT = {"deter": ((2,), np.float32)}


def filled(streams, lengths, capacity=400):
    """Return a replay whose steps and latents say where they are from: {stream: lengths of episodes}."""
    replay = Replay(LAYOUT, LATENT, streams=streams, capacity=capacity, length=4)
    for index, own in lengths.items():
        for number, length in enumerate(own):
            value = np.full(length, 100 * index + number, np.float32)
            flags = {key: np.zeros(length, bool) for key in ("is_first", "is_last", "is_terminal")}
            latents = {"deter": np.stack([value, value], 1)}
            replay.extend(index, f"{index}-{number}.npz", {"reward": value, **flags}, latents)
    return replay


def test_streams_keep_their_places_where_there_are_as_many(tmp_path):
    states = [filled(2, {0: [5, 6], 1: [7]}).state_dict(), filled(2, {0: [8], 1: [9]}).state_dict()]
    for rank in range(4):
        replay = Replay(LAYOUT, LATENT, streams=1, capacity=100, length=4)
        own, _ = deal(states, [], rank, 4, 4, replay)
        assert [length for _, length in own["streams"][0]["episodes"]] == [[5, 6], [7], [8], [9]][rank]
    whole, _ = deal(states, [], 0, 1, 4, Replay(LAYOUT, LATENT, streams=4, capacity=100, length=4))
    assert [stream["stop"] for stream in whole["streams"]] == [11, 7, 8, 9]


def test_episodes_are_dealt_with_their_latents_where_the_streams_are_others(tmp_path):
    state = filled(1, {0: [5, 6, 7]}).state_dict()
    paths = [tmp_path / f"{name}.npz" for name in ("0-0", "0-1", "0-2", "new1", "new2")]
    seen = []
    for rank in range(2):
        replay = Replay(LAYOUT, LATENT, streams=3, capacity=100, length=4)
        own, files = deal([state], paths, rank, 2, 6, replay)
        (stream,) = own["streams"]
        values = stream["deter"][:, 0].tolist()
        assert values == [float(name[2]) for name, length in stream["episodes"] for _ in range(length)]
        seen += [path.name for path in files]
    assert sorted(seen) == sorted(path.name for path in paths)
    assert deal([None], paths, 0, 1, 6, replay) == (None, paths)


def test_two_ranks_on_one_gpu_are_told_so(monkeypatch):
    """NCCL's own words for it fill a page. The properties stand in for a GPU's."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device))
    ranks = SimpleNamespace(rank=1, gather=lambda uuid: ["a", uuid, "c", "b"])
    check_own_devices(ranks, "d")
    with pytest.raises(UserError, match=r"^ranks 1 and 3 have one GPU"):
        check_own_devices(ranks, "b")
