"""The processes (ranks) of a run that torchrun, or a scheduler in its way, has started: what they decide together.

Every rank has its share of the environments, the replay and the batch; counters, clocks and decisions are those of all.
What one rank fails at, the others hear of where they would next agree on something, so that they end in order, too.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from tools import Lost, UserError, peers

SHARED = ("batch_size", "envs", "dataset_size", "eval_episode_num")  # totals of the run, of which each rank has a part
WIDTH = 12  # numbers that ranks can agree on at once
PATIENCE = datetime.timedelta(hours=1)  # for a rank that is alive: one may evaluate or compile far longer than another


class Elsewhere(Exception):
    """Another rank has failed, and says why."""


def environment(name: str, default: int) -> int:
    """Return a number that torchrun tells by an environment variable. Raises UserError for what is no number."""
    text = os.environ.get(name, "") or str(default)
    if not text.isdigit():
        raise UserError(f"{name}={text} in the environment: expected a number, as torchrun sets it")
    return int(text)


def placed() -> tuple[int, int]:
    """Return the rank of this process and how many there are: 0 and 1 without torchrun."""
    count = environment("WORLD_SIZE", 1)
    return (environment("RANK", 0), count) if count > 1 else (0, 1)


def speaks(error: Exception) -> bool:
    """True if this process is the one to print a mistake, which other ranks may have found, too."""
    alone = os.environ.get("WORLD_SIZE", "") in ("", "1")
    return bool(getattr(error, "own", alone or os.environ.get("RANK") == "0"))


def check(config: Any) -> None:
    """Raise UserError for a configuration that several ranks, or an actor of its own, cannot run."""
    _, count = placed()
    if config.collect == "async":
        if config.script != "train":
            raise UserError(f"--collect async: --script {config.script} collects nothing")
        if config.agent == "world_models":
            raise UserError("--collect async: --agent world_models learns between episodes that it waits for")
        if config.remote.actors:
            raise UserError("--collect async: its actor is on this machine, leave out --remote.actors")
        if count > 1:
            raise UserError("--collect async: an actor has one learner, leave out torchrun")
    if count == 1:
        return
    if config.remote.actors:
        raise UserError("--remote.actors: a fleet of actors has one learner, leave out torchrun")
    if config.agent == "world_models":
        raise UserError("--agent world_models learns one stage after the other in one process: leave out torchrun")
    if config.script == "eval_only":
        raise UserError("--script eval_only plays in one process: leave out torchrun")
    for key in SHARED:
        if config[key] % count:
            near = max(count, round(config[key] / count) * count)
            raise UserError(f"--{key} {config[key]} cannot be shared by {count} ranks: take {near}, for all of them")


def share(config: Any, ranks: Ranks) -> Any:
    """Return a configuration as one rank acts on it: with its part of what is the run's, and quiet but in the first."""
    if ranks.count == 1:
        return config
    parts = {key: config[key] // ranks.count for key in SHARED} | {"eval_envs": -(-config.eval_envs // ranks.count)}
    if ranks.rank:
        level = "warning" if config.log_level in ("debug", "info") else config.log_level
        parts |= {"log_level": level, "video_pred_log": False, "keep": ()}
    return config.replace(**parts)


# ---------------------------------------------------------------------------
# Agreeing


class Ranks:
    """The ranks of a run, seen from one of them. With one, whatever it finds holds.

    Args:
      rank: number of this one; count: how many there are; group: of torch.distributed, by which they agree.
    Attributes:
      stopped, save_asked: what signals asked this process for; the others do not know yet.
    """

    def __init__(self, rank: int = 0, count: int = 1, group: Any = None):
        self.rank, self.count, self.group = rank, count, group
        self.stopped: int | None = None
        self.save_asked = False

    def agree(self, numbers: Sequence[int] = ()) -> list[list[int]]:
        """Return the whole numbers of all ranks, a row each; all have come so far then.

        Raises Elsewhere if another rank has failed, Lost if one is gone.
        """
        if self.count == 1:
            return [list(numbers)]
        rows = self._exchange([0, *numbers])
        if any(row[0] for row in rows):
            self._texts("")
            failed = ", ".join(str(rank) for rank, row in enumerate(rows) if row[0])
            raise Elsewhere(f"rank {failed} has failed")
        return [row[1 : len(numbers) + 1] for row in rows]

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks: whatever can be pickled. Raises as `agree` does."""
        if self.count == 1:
            return [value]
        self.agree()
        return self._texts(value)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Let the others hear of an error of the body, which they must end by agreeing on something."""
        try:
            yield
        except (Elsewhere, Lost):
            raise
        except BaseException as error:
            if self.count > 1:
                self._fail(error)
            raise

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Go through the body together: if one rank fails in it, all do."""
        with self.telling():
            yield
            self.agree()

    def _fail(self, error):
        """Tell of an error; of a mistake that several have found, the first of them will speak."""
        self._exchange([1])
        known = self._texts(f"{error}")[: self.rank]
        if isinstance(error, UserError):
            error.own = f"{error}" not in known  # type: ignore[attr-defined]

    def _exchange(self, numbers):
        import torch
        from torch import distributed

        row = torch.zeros(WIDTH, dtype=torch.int64)
        row[: len(numbers)] = torch.tensor(numbers)
        rows = [torch.empty_like(row) for _ in range(self.count)]
        with peers():
            distributed.all_gather(rows, row, self.group)
        return [each.tolist() for each in rows]

    def _texts(self, value):
        from torch import distributed

        values = [None] * self.count
        with peers():
            distributed.all_gather_object(values, value, self.group)
        return values


@contextlib.contextmanager
def joined(config: Any, start: Callable[[int, int], None]) -> Iterator[Ranks]:
    """Wait for the other ranks, if torchrun has started any, and compute with them in the body.

    start: function (rank, count) that is told of it, and again at the end: `ops.collectives.start`.
    """
    rank, count = placed()
    if count == 1:
        yield Ranks()
        return
    from torch import distributed

    from training.machine import choose_device

    device = choose_device(config.device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(f"WORLD_SIZE is {count}, but there is no {' and no '.join(missing)}: start by torchrun")
    try:
        distributed.init_process_group(backend, rank=rank, world_size=count, timeout=PATIENCE)
        group = distributed.new_group(backend="gloo", timeout=PATIENCE) if backend != "gloo" else None
    except RuntimeError as error:  # torch's own words fill a page
        raise UserError(f"rank {rank} cannot reach the others: {str(error).splitlines()[0]}") from None
    start(rank, count)
    ranks = Ranks(rank, count, group)
    try:
        if device.type == "cuda":
            check_own_devices(ranks, device)
        yield ranks
        distributed.destroy_process_group()
    finally:
        start(0, 1)


def check_own_devices(ranks: Ranks, device: Any) -> None:
    """Raise UserError if two ranks compute on one GPU, which NCCL cannot."""
    import torch

    cards = ranks.gather(str(torch.cuda.get_device_properties(device).uuid))
    same = [str(rank) for rank, card in enumerate(cards) if card == cards[ranks.rank]]
    if len(same) > 1:
        raise UserError(f"ranks {' and '.join(same)} have one GPU: start no more processes on a machine than it has")


# ---------------------------------------------------------------------------
# What a run agrees on


class Agreed(NamedTuple):
    """The state of all ranks: whether every replay is ready, the steps in all, restarts of environments in all."""

    ready: bool
    steps: int
    restarts: int


def settle(run: Any, steps: int = 0, played: Sequence[Any] = (), learning: bool = False) -> int:
    """Tell the other ranks what happened, and let `run` know what happened in all; return the agent steps of all.

    Signals, and the times at which to log and save, are heard of here, so that every rank acts on them at one place.

    Args:
      run: Run; steps: agent steps since the last call; played: episodes that ended; learning: True after a learn call.
    """
    ranks, replay = run.ranks, run.replay
    log, save = run.times(learning) if ranks.rank == 0 else (False, False)
    run.log_due, run.save_due = run.log_due or log, run.save_due or save
    if ranks.count == 1:
        return steps
    asked, ranks.save_asked = ranks.save_asked, False
    mine = [steps, replay.ready(), len(replay), run.restarts(), len(played), ranks.stopped or 0, log, save, asked]
    columns = list(zip(*ranks.agree([int(number) for number in mine]), strict=True))
    run.agreed = Agreed(all(columns[1]), sum(columns[2]), sum(columns[3]))
    run.stopped = run.stopped or max(columns[5]) or None
    run.log_due, run.save_due = run.log_due or any(columns[6]), run.save_due or any(columns[7])
    run.save_asked = run.save_asked or any(columns[8])
    for part in ranks.gather(list(played)) if any(columns[4]) else ():
        for episode in part:
            run.finished(episode)
    return sum(columns[0])


def check_same_place(ranks: Ranks, logdir: Any, place: Sequence[int]) -> None:
    """Raise UserError unless all ranks stand where the first does: then they do not see the same files.

    place: counters of the run.
    """
    rows = ranks.agree(place)
    if rows[ranks.rank] != rows[0]:
        raise UserError(f"--logdir {logdir}: rank {ranks.rank} finds another run there than rank 0: it must be shared")
