"""Trials under way: what is started next, what is reported of it, when it ends."""

from __future__ import annotations

import json
import pathlib
import signal
import sys
import time
from collections import deque
from typing import Any

from sweeps.plan import Plan
from sweeps.processes import ROOT
from sweeps.settings import plain
from sweeps.study import Study, Trial
from tools import UserError, atomic_write, locked
from training.console import print_line
from training.logdir import as_flag, scores

PROGRAM = (str(ROOT / "dreamer.py"),)
POLL = 0.2  # seconds between two looks at the processes
TRIES = 3  # times that a training which was killed is started again
FAILURES = 3  # in a row, after which a sweep gives up


def evaluations(logdir: pathlib.Path, episodes: int) -> dict[int, float]:
    """Return {step: mean return} of the evaluations in a logdir that were played to their end."""
    found: dict[int, list[float]] = {}
    for entry in scores(logdir, "eval"):
        found.setdefault(entry["step"], []).append(float(entry["score"]))
    return {step: sum(each[-episodes:]) / episodes for step, each in sorted(found.items()) if len(each) >= episodes}


class Training:
    """One seed of a trial: a logdir, and the process that trains there while one does."""

    def __init__(self, plan: Plan, trial: Trial, seed: int):
        self.plan, self.trial, self.seed = plan, trial, seed
        self.config = plan.config(trial.number, trial.values, seed)
        self.logdir = pathlib.Path(self.config.logdir)
        self.process: Any = None
        self.started = self.blocked = False
        self.tries = 0
        self.value: float | None = None  # once it is done
        self.name = f"trial {trial.number}" + (f" seed {seed}" if len(plan.seeds) > 1 else "")
        self.log = plan.folder / "trials" / f"{trial.number:03}-seed{seed}.log"

    def free(self) -> bool:
        """True if no process is in the logdir, as one of a sweep that was killed may still be; else say so, once."""
        if self.logdir.is_dir():
            try:
                with locked(self.logdir):
                    pass
            except UserError as error:
                if not self.blocked:
                    print_line(f"{self.name} waits: {error}")
                self.blocked = True
                return False
        return True

    def start(self, launcher: Any, device: str) -> None:
        """Start the process, which goes on from what the logdir holds."""
        keys = self.plan.given | self.trial.values | {"seed": self.seed, "device": device}
        keys["logdir"] = self.config.logdir.replace("{", "{{").replace("}", "}}")
        path = self.log.with_suffix(".json")
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, lambda file: file.write(json.dumps(plain(keys), indent=2).encode()))
        self.process = launcher.start([sys.executable, *PROGRAM, *self.plan.flags(), "--config", str(path)], self.log)
        self.started = True

    def evaluations(self) -> dict[int, float]:
        """Return {step: mean return} of the evaluations so far."""
        return evaluations(self.logdir, self.config.eval_episode_num)

    def last_line(self) -> str:
        """Return the last line that the process has printed."""
        lines = self.log.read_text(errors="replace").split("\n") if self.log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


class Sweep:
    """Carries out a plan.

    Args:
      plan: Plan; study: Study; launcher: with a method start(argv, log) that returns a process.
    """

    def __init__(self, plan: Plan, study: Study, launcher: Any):
        self.plan, self.study, self.launcher = plan, study, launcher
        self.trials: dict[int, list[Training]] = {}  # those under way
        self.reported: dict[int, int] = {}  # the last step of each
        self.queue: deque[Training] = deque()
        self.devices = deque(plan.devices)
        self.failed = self.in_a_row = 0

    def run(self, ending: Any) -> int:
        """Run all trials, or until `ending.stopped` is set; return how many failed."""
        try:
            for trial in self.study.unfinished():
                self.begin(trial, "goes on")
            while self.in_a_row < FAILURES and not ending.stopped:
                self.fill()
                if not self.trials:
                    break
                self.look()
                time.sleep(POLL)
            self.end([training for each in self.trials.values() for training in each], ending)
        except BaseException:
            for training in self.running():
                training.process.kill()
            raise
        if self.in_a_row >= FAILURES:
            print_line(f"sweep.py: gave up after {FAILURES} trials in a row that failed")
        return self.failed

    # -- starting

    def begin(self, trial: Trial, verb: str) -> None:
        """Queue the trainings of a trial."""
        values = ", ".join(f"{key} {shown(value)}" for key, value in trial.values.items())
        print_line(f"trial {trial.number} {verb}{': ' * bool(values)}{values}")
        self.trials[trial.number] = [Training(self.plan, trial, seed) for seed in self.plan.seeds]
        self.reported[trial.number] = trial.reached
        self.queue.extend(self.trials[trial.number])

    def running(self) -> list[Training]:
        """Return the trainings that have a process."""
        return [training for each in self.trials.values() for training in each if training.process]

    def fill(self) -> None:
        """Start trainings while there is room: those of trials that are begun, then those of a new one."""
        room = self.plan.settings.at_once - len(self.running())
        blocked = []
        while room > 0:
            if not self.queue:
                trial = self.study.ask()
                if not trial:
                    break
                self.begin(trial, "begins")
            training = self.queue.popleft()
            if training.free():
                training.start(self.launcher, self.devices[0])
                self.devices.rotate(-1)
                room -= 1
            else:
                blocked.append(training)
                room -= 1  # it is at work, in a process of before
        self.queue.extend(blocked)

    # -- looking

    def look(self) -> None:
        """See what has ended and what was evaluated."""
        for number, trainings in list(self.trials.items()):
            trouble = next(filter(None, map(self.outcome, trainings)), None)
            if trouble:
                self.conclude(number, "failed", trouble)
            elif all(training.value is not None for training in trainings):
                self.conclude(number, "complete")
            elif self.falls_behind(number, trainings):
                self.conclude(number, "pruned")

    def outcome(self, training: Training) -> str | None:
        """Take note of the end of a process; return what is wrong if its trial cannot go on."""
        status = training.process.poll() if training.process else None
        if status is None:
            return None
        training.process = None
        if status in (1, 2):
            return training.last_line()
        if status:  # killed, or ended by a signal that was not ours
            training.tries += 1
            if training.tries > TRIES:
                return f"its process was ended {training.tries} times (status {status}); see {training.log}"
            print_line(f"{training.name}: its process was ended (status {status}), and starts again")
            self.queue.appendleft(training)
            return None
        found = training.evaluations()
        if not found:
            return f"it ended without an evaluation; see {training.log}"
        training.value = found[max(found)]
        return None

    def falls_behind(self, number: int, trainings: list[Training]) -> bool:
        """Report the evaluations that all seeds which have begun have reached; True if the trial is to end."""
        begun = [training.evaluations() for training in trainings if training.started]
        if not begun:
            return False
        for step in sorted(set.intersection(*map(set, begun))):
            if step > self.reported[number]:
                self.reported[number] = step
                value = sum(each[step] for each in begun) / len(begun)
                print_line(f"trial {number} at step {step:,}: return {value:.1f}")
                if self.study.report(number, step, value) and step < trainings[0].config.steps:
                    return True
        return False

    def conclude(self, number: int, state: str, why: str = "") -> None:
        """End a trial, and tell the study."""
        trainings = self.trials[number]
        self.queue = deque(training for training in self.queue if training not in trainings)
        self.end(trainings)
        del self.trials[number]
        seeds = {each.seed: each.value for each in trainings if each.value is not None}
        self.study.tell(number, state, seeds)
        self.failed += state == "failed"
        self.in_a_row = self.in_a_row + 1 if state == "failed" else 0
        result = (
            f": return {sum(seeds.values()) / len(seeds):.1f}" if state == "complete" else f": {why}" if why else ""
        )
        print_line(f"trial {number} is {state}{result}")

    def end(self, trainings: list[Training], ending: Any = None) -> None:
        """End processes in good order: each saves its checkpoint. More signals to the sweep are passed on."""
        left = [training for training in trainings if training.process]
        for training in left:
            training.process.send_signal(signal.SIGTERM)
        passed = 0
        while left := [training for training in left if training.process.poll() is None]:
            if ending and ending.again > passed:
                passed = ending.again
                for training in left:
                    training.process.send_signal(signal.SIGTERM)
            time.sleep(POLL)
        for training in trainings:
            training.process = None


def shown(value: Any) -> str:
    """Return a value in a few digits."""
    return f"{value:.4g}" if isinstance(value, float) else as_flag(value)
