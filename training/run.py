"""What a training run is beside environments, agent and replay: counters, clocks, logs, checkpoints, signals."""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from replay.dealing import deal
from replay.episodes import EpisodeWriter, by_age, episode_files
from tools import Every, Lost, Rates, UserError, locked, sweep
from training.async_learner import Bounded
from training.background import Background
from training.checkpoint import (
    RESUMED,
    checkpoint_file,
    files_of,
    load_agent_state,
    load_checkpoint,
    load_states,
    save_checkpoint,
    stored_file,
)
from training.console import warn_at
from training.distributed import Agreed, Ranks, settle, share
from training.driver import Episode
from training.journal import recover
from training.keep import Keeper
from training.logdir import SAME, check_logdir, named, save_config
from training.logger import Metrics
from training.outputs import Outputs, Recorder
from training.progress import Ahead
from training.protocol import Agent
from training.rng import generator_states, get_rng_state, set_generator_states, set_rng_state

LONGEST_UNLOGGED = 60  # seconds that an agent may learn on and on, while no frames pass, until there is a log
LONGEST_UNSAVED = 600  # the same for a checkpoint


class Run:
    """A run that can be interrupted at any learn call and resumed.

    Args:
      config: the whole configuration.
      agent: Agent; replay: Replay, empty; random: the agent that collects before there is enough to learn from.
      ranks: the processes that share the run, of which agent and replay are one's.
    Attributes:
      agent_steps, updates, episodes: counters of what was collected and learned in all.
      stopped: number of the signal that asked the run to end, or None.
      save_asked: True if a signal asked for a checkpoint; log_due, save_due: True if the time for it has come.
      agreed: what holds for all ranks where there are several, else None.
      resumed: True if it goes on from a checkpoint.
    """

    def __init__(self, config: Any, agent: Agent, replay: Any, random: Agent, ranks: Ranks | None = None):
        self.config, self.agent, self.replay, self.random = config, agent, replay, random
        self.ranks = ranks or Ranks()
        self.agreed: Agreed | None = None
        self.logdir = pathlib.Path(config.logdir).expanduser()
        self.offline = config.script == "train_offline" or bool(config.offline_traindir)
        self.agent_steps = self.updates = self.episodes = 0
        self.stopped: int | None = None
        self.save_asked = self.log_due = self.save_due = False
        self.times = functools.partial(asked_by_time, self)
        self.keeper = Keeper(self.logdir, share(config, self.ranks).keep, functools.partial(checkpoint_of, self))
        self.files = files_of(config)  # as they are now: the environments have read them, or will at once
        self.saved_names: set[str] = set()  # of the episode files that the last checkpoint needs
        self.resumed = self.acting = self.learning = False  # the latter two after the first time in this process
        self.metrics = Metrics()
        self.clock = Bounded(agent.clock(config)) if config.collect == "async" else agent.clock(config)
        self.clocks: dict[str, Any] = {
            "ratio": self.clock,
            "log": Every(config.log_every),
            "eval": Every(config.eval_every, first=False),
            "save": Every(config.save_every, first=False),
        }
        self.logged_at = self.saved_at = time.monotonic()  # or when last nothing was due
        self.restarts: Callable[[], int] = lambda: 0  # of environments
        self.extras: Callable[[], dict[str, float]] = dict  # metrics of how steps are collected
        self.ending: Callable[[], int] | None = None  # ends what collects by itself; returns its last agent steps
        self.spaces: Mapping[str, Any] | None = None  # the environments' own, as envs/spaces.py describes them
        self.background = Background()  # which writes the episodes

    # -- where the run stands

    @property
    def step(self) -> int:
        """Environment frames so far, action repeat included."""
        return self.agent_steps * self.config.action_repeat

    def going(self) -> bool:
        """True until the last frame was seen, nothing is left to learn, or a signal came."""
        return self.step < self.config.steps and not self.clock.finished() and not self.stopped

    def filled(self) -> bool:
        """True if enough was collected to learn from."""
        ready = self.agreed.ready if self.agreed else self.replay.ready()
        return ready and (self.agent_steps >= self.config.prefill or self.offline)

    def collector(self) -> tuple[Agent, str]:
        """Return who collects now, and its mode of acting."""
        exploring = not self.config.expl_until or self.step < self.config.expl_until
        if not self.filled() or (exploring and self.config.expl_behavior == "random"):
            return self.random, "sample"
        if not self.acting:
            self.acting = True
            if self.config.compile:  # the agent's first action, as its first update
                self.out.begin("compiling")
        return self.agent, "explore" if exploring else "noisy"

    def learning_due(self) -> bool:
        """True if a learn call is due now."""
        due = self.filled() and not self.stopped and self.clock.due(self.agent_steps) > 0
        if due and not self.learning:
            self.learning = True
            if self.config.compile:
                self.out.begin("compiling")
        return due

    # -- what happened

    def learned(self, metrics: Mapping[str, Any]) -> None:
        """Count a learn call, and serve what is overdue where no frames pass."""
        self.clock.tick()
        self.updates += 1
        self.metrics.add(metrics, self.step)
        self.out.show(*stage_of(self))
        self.background.look()
        settle(self, learning=True)
        if self.log_due:
            self.log()
        if self.save_due or self.save_asked:
            self.save()

    def finished(self, episode: Episode) -> None:
        """Count a training episode, which is logged as soon as its file is written: what is logged is not lost."""
        self.episodes += 1
        self.background.then(functools.partial(self.out.trained, self.step, self.episodes, episode))

    def serve(self) -> None:
        """Show, log and save what is due. Raises OSError if the disk did not take an episode."""
        self.background.look()
        self.logged_at = self.saved_at = time.monotonic()
        self.out.show(*stage_of(self))
        if self.clocks["log"](self.step):
            self.log()
        timed = self.ranks.count > 1 and self.clocks["save"].by_time  # the first rank's time is that of all: `settle`
        if self.save_due or self.save_asked or (not timed and self.clocks["save"](self.step)):
            self.save()
        self.keeper.serve(self.step)

    def log(self) -> None:
        """Write the means of the metrics since the last log."""
        self.logged_at, self.log_due = time.monotonic(), False
        soon = self.config.envs * (self.config.batch_length + 1)  # when what each environment gave is that long
        if self.agent_steps > max(self.config.prefill, soon) and not self.replay.ready():
            what = "an episode" if self.config.replay_window.startswith("episode") else "what an environment gave"
            need = f"--batch_length {self.config.batch_length}"
            self.out.say("warning", f"nothing is learned before {what} is as long as {need}, and a step more")
        self.metrics.drain()
        scalars = self.metrics.means()
        steps, restarts = self.agreed[1:] if self.agreed else (len(self.replay), self.restarts())
        scalars |= {"updates": self.updates, "replay_steps": steps, "env_restarts": restarts}
        scalars |= self.extras() | self.rates(fps=self.step, updates_per_second=self.updates)
        self.out.logger.scalars(scalars, self.step)
        self.out.logger.flush()

    # -- saving

    def open(self, stack: contextlib.ExitStack) -> Outputs:
        """Begin to write, where the run stands; `stack` closes what is opened. Raises UserError if that fails."""

        def held() -> set[str]:  # by memory, now or in the checkpoint that a run would go on from
            return self.replay.names() | self.saved_names

        own, first = share(self.config, self.ranks), self.ranks.rank == 0
        others = set().union(*self.ranks.gather(self.replay.names())) - self.replay.names()  # of which they take care
        mine = (lambda name: name not in others) if first else self.replay.names().__contains__
        try:
            config = self.config if first else own
            self.out = Outputs(config, self.step, self.updates, functools.partial(ahead_of, self), not first)
            stack.callback(self.out.close)
            if first:
                save_config(self.config, self.logdir)
            if self.config.eval_episode_num:
                (self.logdir / "eval_eps").mkdir(exist_ok=True)
            later = {} if own.collect == "async" else {"later": self.background}  # the journal keeps what is in no file
            writer = EpisodeWriter(self.logdir / "train_eps", own.envs, own.dataset_size, held, mine, **later)
        except OSError as error:
            raise UserError(f"--logdir {self.config.logdir}: {error.strerror}") from None
        stack.callback(self.background.close)
        self.recorder = Recorder(self.replay, writer)
        self.rates = Rates(fps=self.step, updates_per_second=self.updates)
        return self.out

    def save(self) -> None:
        """Write a checkpoint that `restore` goes on from."""
        with self.out.stage("saving"), self.ranks.telling():
            self.background.wait()  # it names the episodes that it needs
            stored = self.replay.state_dict() | ({"generators": generators_of(self)} if self.ranks.count > 1 else {})
            save_checkpoint(self.logdir, checkpoint_of(self), stored, self.ranks, self.updates)
        self.saved_names = self.replay.names()
        self.saved_at, self.save_due = time.monotonic(), False
        if self.save_asked:
            self.save_asked = False
            self.out.say("info", f"saved at step {self.step:,}, as a signal asked")

    def save_all(self) -> None:
        """Save all there is, unfinished episodes included."""
        self.background.wait()  # which tries once more what the disk did not take
        self.recorder.flush()
        self.save()

    @contextlib.contextmanager
    def saving_on_error(self) -> Iterator[None]:
        """Save everything collected so far if the body raises, whatever it is that environments raise."""
        try:
            with self.ranks.telling():
                yield
        except Lost:  # without it there is nothing to save
            raise
        except BaseException:
            self.save_all()
            raise

    def restore(self, saved: dict[str, Any] | None, paths: Sequence[pathlib.Path]) -> None:
        """Go on from the logdir's checkpoint, or start from another run's agent; fill the replay from episode files.

        Nothing is written. Raises UserError if the checkpoint does not fit, or if there is nothing to learn from.
        """
        config, warn = self.config, functools.partial(warn_at, self.config.log_level)
        if saved and config.from_checkpoint and not checkpoint_file(config.from_checkpoint).is_file():
            way = f"leave it out to go on from {self.logdir / 'latest.pt'}"
            raise UserError(f"--from_checkpoint {config.from_checkpoint}: no such file; {way}")
        if saved and not goes_on(self.agent, saved, config, warn):
            saved = None
        self.resumed = saved is not None
        states = load_states(self.logdir, saved, warn) if saved else [None]
        if self.replay.tight:
            warn(self.replay.tight)
        stored, paths = deal(states, paths, self.ranks.rank, self.ranks.count, config.envs, self.replay)
        self.replay.restore(stored, paths, warn)
        self.saved_names = self.replay.names()
        if self.offline and not self.replay.ready():
            where = config.offline_traindir or f"--offline_traindir or {self.logdir / 'train_eps'}"
            raise UserError(f"{where} must hold {config.batch_length + 1} steps of this task to learn from")
        self.keeper.begin(saved["counters"]["agent_steps"] * config.action_repeat if saved else 0, warn)
        if saved is None:
            if config.from_checkpoint:
                load_agent_state(self.agent, load_checkpoint(checkpoint_file(config.from_checkpoint)), config)
            return
        for name, value in saved["counters"].items():
            setattr(self, name, value)
        for name, clock in self.clocks.items():
            clock.load_state_dict(saved["clocks"][name])
        if self.ranks.rank:
            saved = (states[self.ranks.rank] or {}).get("generators") if self.ranks.rank < len(states) else None
        if saved:  # else this is a rank that was not there before
            set_rng_state(saved["rng"])
            set_generator_states(self.agent.generators, saved["rng"].get("agent", {}))  # older ones lack them
            set_generator_states(self.random.generators, {"act": saved["random"]})


def checkpoint_of(run: Run) -> dict[str, Any]:
    """Return what a run goes on from, but for what the replay stores, which has a file of its own."""
    run.metrics.drain()
    return {
        "kind": run.config.agent,
        "agent": run.agent.state_dict(),
        "counters": {"agent_steps": run.agent_steps, "updates": run.updates, "episodes": run.episodes},
        "clocks": {name: clock.state_dict() for name, clock in run.clocks.items()},
        **generators_of(run),
        "replay": stored_file(run.updates, run.ranks.count, 0),
        "ranks": run.ranks.count,
        "spaces": run.spaces,
        "files": run.files,
        **{key: run.config[key] for key in SAME},
    }


def goes_on(agent: Agent, saved: Mapping[str, Any], config: Any, warn: Callable[[str], None]) -> bool:
    """Load the agent of the logdir's checkpoint; False if it is another's that has met and learned nothing yet.

    Raises UserError if it has.
    """
    try:
        load_agent_state(agent, saved, config)
    except UserError as error:
        if saved["counters"]["updates"] or saved["counters"]["episodes"]:
            raise named(error, config) from None
        warn(f"{config.logdir}: begins anew at step 0, as nothing was learned there yet: {error}")
        return False
    return True


def generators_of(run: Run) -> dict[str, Any]:
    """Return the states of all generators of this process."""
    rng = get_rng_state() | {"agent": generator_states(run.agent.generators)}
    return {"rng": rng, "random": generator_states(run.random.generators)["act"]}


def asked_by_time(run: Run, learning: bool) -> tuple[bool, bool]:
    """Return whether the time has come for a log, and for a checkpoint; where frames pass, `serve` sees to the rest.

    learning: True after a learn call, False after steps in the environments.
    """
    now, save = time.monotonic(), run.clocks["save"]
    timed = (learning or run.ranks.count > 1) and save.by_time and save(run.step)
    late = learning and now - run.saved_at > LONGEST_UNSAVED and run.config.save_every
    return learning and now - run.logged_at > LONGEST_UNLOGGED, bool(timed or late)


def stage_of(run: Run) -> tuple[str, int, int, float | None]:
    """Return the word for what a run does between evaluations, frames, updates, and the share of a learner's stage."""
    name, share = run.clock.stage() or ("learning", None)
    return (name, run.step, run.updates, share) if run.filled() else ("prefill", run.step, run.updates, None)


def ahead_of(run: Run) -> Ahead:
    """Return what is to come until a run has seen its last frame: frames, updates, and stages by name."""
    config, last = run.config, math.ceil(run.config.steps / run.config.action_repeat)
    begin = run.agent_steps if run.offline else max(run.agent_steps, config.prefill)
    evaluations = count_of(config.eval_every, run.step, config.steps) + 1 if config.eval_episode_num else 0
    saves = 0 if run.clocks["save"].by_time else count_of(config.save_every, run.step, config.steps)
    frames = max(0, config.steps - run.step)
    return Ahead(frames, run.clock.left(last, begin), {"evaluating": evaluations, "saving": saves + 1})


def count_of(period: float, step: int, end: int) -> int:
    """Return how many multiples of a period there are after `step` and before `end`; 0 of a period of 0 or less."""
    return max(0, math.ceil(end / period) - 1 - math.floor(step / period)) if period > 0 else 0


def open_logdir(
    config: Any, stack: contextlib.ExitStack, ranks: Ranks | None = None
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Keep other runs out of the logdir, which is made for that, and look at what a run before has left there.

    `stack` removes it again if nothing comes to stand there. What a killed run has left behind is swept away. The first
    of the ranks does so while the others wait, and then only look.

    Returns: its checkpoint, or None, and what has changed since, {key: (value before, value now)}. Raises UserError if
    the logdir cannot be made, is another run's, or holds what no run can go on from.
    """
    ranks, logdir = ranks or Ranks(), pathlib.Path(config.logdir).expanduser()
    path = logdir / "latest.pt"
    if ranks.rank:
        ranks.agree()
        return load_checkpoint(path, RESUMED) if path.exists() else None, {}
    try:
        new = [folder for folder in (logdir, *logdir.parents) if not folder.exists()]
        logdir.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # such as a name that no file system takes
        raise UserError(f"--logdir {config.logdir!a}: {getattr(error, 'strerror', None) or error}") from None
    stack.callback(_remove_empty, new)
    if stack.enter_context(locked(logdir)):
        sweep([logdir, logdir / "train_eps", logdir / "eval_eps"])
    if count := recover(logdir):
        warn_at(
            config.log_level, f"{count} steps that an actor had left in the journal are in {logdir / 'train_eps'} now"
        )
    saved = load_checkpoint(path, RESUMED) if path.exists() else None
    changed = check_logdir(config, saved, functools.partial(warn_at, config.log_level))
    ranks.agree()
    return saved, changed


def _remove_empty(folders: Sequence[pathlib.Path]) -> None:
    """Remove folders, the inner ones first, as far as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def episode_paths(config: Any) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Return the episode files of offline_traindir, and those that the run has written, oldest first.

    Raises UserError if there is no such directory.
    """
    folder = pathlib.Path(config.offline_traindir).expanduser()
    if config.offline_traindir and not folder.is_dir():
        raise UserError(f"--offline_traindir {folder}: no such directory")
    own = by_age(episode_files(pathlib.Path(config.logdir) / "train_eps"))
    return (episode_files(folder) if config.offline_traindir else []), own
