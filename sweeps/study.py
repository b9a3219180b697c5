"""What the search knows: an Optuna study, in an SQLite file in the sweep's folder or on a server."""

from __future__ import annotations

import datetime
import itertools
import json
import uuid
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from sweeps.plan import Choice, Plan
from tools import UserError, atomic_write, derive_seed
from training.logdir import as_flag

try:
    import optuna
    from optuna.trial import TrialState
except ImportError:
    raise UserError("sweeps need Optuna: pip install -r requirements/sweep.txt") from None

UNOWNED = datetime.timedelta(minutes=1)  # that a sweep takes at most to sign a trial on a server
STARTUP = 5  # trials that are done before the first is ended early
PRUNERS = {
    "none": lambda plan: optuna.pruners.NopPruner(),
    "median": lambda plan: optuna.pruners.MedianPruner(STARTUP, int(plan.settings.prune_from)),
    "halving": lambda plan: optuna.pruners.SuccessiveHalvingPruner(int(plan.settings.prune_from) or "auto"),
}
SAMPLERS = {
    "grid": lambda seed: optuna.samplers.RandomSampler(seed),  # of no use: its trials are queued
    "random": lambda seed: optuna.samplers.RandomSampler(seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
}


class Trial(NamedTuple):
    """A trial that is under way: its number, {key: value} of what is searched, and the last step reported, or -1."""

    number: int
    values: dict[str, Any]
    reached: int = -1


class Row(NamedTuple):
    """The outcome of a trial: its state, {key: value}, mean return (None if there is none), and those of its seeds."""

    number: int
    state: str
    values: dict[str, Any]
    value: float | None
    seeds: list[float]


class Study:
    """The trials of a plan, as far as they are known.

    Args:
      plan: Plan; study: Optuna's; own: text that tells the trials of this folder from those of others on a server.
    """

    def __init__(self, plan: Plan, study: Any, own: str):
        self.plan, self.study, self.own = plan, study, own

    def unfinished(self) -> list[Trial]:
        """Return this folder's trials that were under way when it was left, one that had no owner yet included."""
        found = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        old = datetime.datetime.now() - UNOWNED
        trials = []
        for frozen in found:
            unowned = "own" not in frozen.user_attrs and (not self.plan.settings.storage or frozen.datetime_start < old)
            if unowned or frozen.user_attrs.get("own") == self.own:
                reached = max(frozen.intermediate_values, default=-1)
                trials.append(self._taken(optuna.trial.Trial(self.study, frozen._trial_id))._replace(reached=reached))
        return trials

    def ask(self) -> Trial | None:
        """Return a new trial, or None if there are as many as there are to be."""
        begun = [trial for trial in self.study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
        if len(begun) >= self.plan.trials:
            return None
        # What is drawn after a resumption must not be what was drawn at the start.
        self.study.sampler = SAMPLERS[self.plan.settings.method](derive_seed(self.plan.seeds[0], len(begun)))
        return self._taken(self.study.ask())

    def _taken(self, trial: Any) -> Trial:
        """Return an Optuna trial as this folder's, with the values that it lacks drawn."""
        trial.set_user_attr("own", self.own)
        for key, each in self.plan.search.items():
            if isinstance(each, Choice):
                trial.suggest_categorical(key, names(each))
            elif isinstance(each.low, int) and isinstance(each.high, int):
                trial.suggest_int(key, each.low, each.high, log=each.log)
            else:
                trial.suggest_float(key, each.low, each.high, log=each.log)
        return Trial(trial.number, self.decoded(trial.params))

    def report(self, number: int, step: int, value: float) -> bool:
        """Note the mean return of a trial at a step; return True if it does too badly to go on."""
        frozen = self.study.get_trials(deepcopy=False)[number]
        trial = optuna.trial.Trial(self.study, frozen._trial_id)
        if step not in frozen.intermediate_values:
            trial.report(value, step)
        return step >= self.plan.settings.prune_from and trial.should_prune()

    def tell(self, number: int, state: str, seeds: Mapping[int, float]) -> None:
        """Note that a trial is complete, pruned or failed, and the returns {seed: value} of its seeds."""
        frozen = self.study.get_trials(deepcopy=False)[number]
        optuna.trial.Trial(self.study, frozen._trial_id).set_user_attr("seeds", list(seeds.values()))
        value = sum(seeds.values()) / len(seeds) if state == "complete" else None
        self.study.tell(number, value, state=TrialState[state.upper()[:4] if state == "failed" else state.upper()])

    def rows(self) -> list[Row]:
        """Return what came of the trials, the best first."""
        rows = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state != TrialState.WAITING:
                state = "unfinished" if trial.state == TrialState.RUNNING else trial.state.name.lower()
                values, seeds = self.decoded(trial.params), trial.user_attrs.get("seeds", [])
                rows.append(Row(trial.number, state, values, trial.value if trial.values else None, seeds))
        rank = {"complete": 0, "pruned": 1}
        return sorted(rows, key=lambda row: (rank.get(row.state, 2), -(row.value or 0.0), row.number))

    def importances(self) -> dict[str, float]:
        """Return {key: share of the differences in return that it explains}, {} where there is too little to tell."""
        done = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len({trial.value for trial in done}) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        return optuna.importance.get_param_importances(self.study, evaluator=evaluator)

    def decoded(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return {key: value} of what the study keeps; lists lie there as text."""
        values = dict(params)
        for key, each in self.plan.search.items():
            if isinstance(each, Choice) and key in values:
                values[key] = each.values[names(each).index(values[key])]
        return values


def names(choice: Choice) -> list[Any]:
    """Return what stands in the study for each value of a choice: itself, or a text if it is a list."""
    return [as_flag(value) if isinstance(value, tuple) else value for value in choice.values]


def encoded_grid(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield every combination of the choices as the study keeps it."""
    keys = list(plan.search)
    columns = (names(each) for each in plan.search.values() if isinstance(each, Choice))
    yield from (dict(zip(keys, values, strict=True)) for values in itertools.product(*columns))


def open_study(plan: Plan) -> Study:
    """Make the study of a plan, or go on with the one that is there.

    Raises UserError if that is of another plan, or if a server does not answer.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    url = storage_of(plan)
    try:
        study = optuna.create_study(
            storage=url,
            study_name=plan.folder.name,
            direction="maximize",
            pruner=PRUNERS[plan.settings.prune](plan),
            load_if_exists=True,
        )
    except Exception as error:  # those of every database there is
        reason = " ".join(str(error).split())
        raise UserError(f"the study in {url} cannot be opened: {type(error).__name__}: {reason}") from None
    identity = json.loads(json.dumps(plan.identity()))
    before = study.user_attrs.get("sweep")
    if before is None:
        for params in encoded_grid(plan) if plan.settings.method == "grid" else ():
            study.enqueue_trial(params, skip_if_exists=True)
        study.set_user_attr("sweep", identity)
    for key in [*identity, *(before or {})]:
        was, now = (each.get(key, "not given") for each in (before or identity, identity))
        if was != now:
            raise UserError(f"{plan.folder} holds a sweep in which {key} is {was}, not {now}: give another logdir")
    return Study(plan, study, folder_id(plan))


def storage_of(plan: Plan) -> Any:
    """Return the URL of the database that holds the search."""
    return plan.settings.storage or f"sqlite:///{plan.folder / 'sweep.db'}"


def folder_id(plan: Plan) -> str:
    """Return a text that no other sweep's folder has."""
    path = plan.folder / "sweep.id"
    if not path.exists():
        atomic_write(path, lambda file: file.write(uuid.uuid4().hex.encode()))
    return path.read_text()
