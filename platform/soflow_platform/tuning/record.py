"""The record of a sweep (sweep.json): its settings, trials and result, from which it resumes after its driver was killed."""

from __future__ import annotations

import contextlib
import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.errors import UserError
from soflow_platform.registry.candidate import Candidate
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.code_digest import Code, running_code
from soflow_platform.storage.locks import is_locked, locked
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.storage.records import read_record, record_of
from soflow_platform.tuning.lineage import Interval, Replacement, Rung, changes, intervals, values_at

if TYPE_CHECKING:
    from soflow_platform.config.experiment import Experiment
    from soflow_platform.tuning.search_space import Trial

RECORD = "sweep.json"
CODE = "code.json"
LOCK = ".lock"


@dataclass(frozen=True)
class ScoredStep:
    """The evaluation of one step."""

    step: int
    metrics: dict[str, float]

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> ScoredStep:
        """From a dictionary in a checkpoint, which holds the step among the metrics."""
        return cls(evaluation["step"], {key: value for key, value in evaluation.items() if key != "step"})


@dataclass(frozen=True)
class TrialEntry:
    """A trial of the sweep."""

    name: str
    settings: dict[str, Any]
    """The settings that vary over the search space, with their values in this trial."""
    steps: int | None = None
    """Its optimizer steps; None in a record of an earlier version: those of the sweep."""
    phase: str | None = None
    """`drawn` or `final` for a trial that results have led to; None for one of the file."""

    @classmethod
    def of(cls, trial: Trial) -> TrialEntry:
        """The entry of a planned trial."""
        phase = None if trial.phase == "listed" else trial.phase
        return cls(trial.name, trial.settings, trial.experiment.training.steps, phase)


@dataclass(frozen=True)
class BestTrial:
    """The best evaluation of a finished sweep."""

    trial: str
    step: int
    metrics: dict[str, float]
    grids: list[str] = field(default_factory=list)
    """Sample grids of that step."""
    checkpoint: str | None = None
    """Folder or URI of its checkpoint."""
    model: str | None = None
    version: str | None = None
    """Name and version in the model registry, where it was registered."""
    outdone_by: str | None = None
    """Why another version keeps the alias `candidate`."""
    mean: float | None = None
    """Of the metric over the seeds of its point, where that has several."""
    std: float | None = None

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass
class SweepRecord:
    """`sweeps/<id>/sweep.json`."""

    id: str
    name: str
    file: str
    experiment: dict[str, Any]
    trials: list[TrialEntry]
    metric: str
    """Name of the metric by which trials are compared."""
    mode: str
    """`min` or `max`: which value of the metric is better."""
    created: float = field(default_factory=time.time)
    starts: dict[str, Any] = field(default_factory=dict)
    """Weights that trials start from, by their settings: the arguments of `training.start.Start`."""
    attempts: int = 0
    """Number of times that the sweep was started."""
    run: str | None = None
    """MLflow id of the parent run."""
    experiment_id: str | None = None
    """MLflow id of the experiment."""
    tracking_uri: str | None = None
    code: list[str] = field(default_factory=list)
    """Digests of the code that trained it, in order; more than one where it went on with other code."""
    view: bool = False
    """Whether the experiment holds a view of the sweep for MLflow's page, under the key `run`."""
    finished: bool = False
    best: BestTrial | None = None
    rungs: list[Rung] = field(default_factory=list)
    """What was decided at each rung of a population (`search.pbt`), in order."""

    def candidate(self, model: str) -> Candidate:
        """The best evaluation, to be registered under this name. Raises ValueError where there is none yet."""
        if self.best is None:
            raise ValueError(f"sweep {self.id} has no best trial yet")
        return Candidate(
            model=model,
            sweep=self.id,
            trial=self.best.trial,
            step=self.best.step,
            metric=self.metric,
            mode=self.mode,
            metrics=self.best.metrics,
            recipe=self.recipe(self.best.trial),
            trials=len(self.trials),
            grids=tuple(self.best.grids),
        )

    def recipe(self, trial: str) -> dict[str, Any]:
        """The settings that one of its trials is trained with: in a population with the changes at its rungs and its ancestors'."""
        if not self.rungs:
            return self.planned(trial)
        history = self.history(trial)
        recipe = self.planned(history[0].trial)
        if later := changes(history):
            recipe["training"]["changes"] = later
        return recipe

    def history(self, trial: str) -> list[Interval]:
        """The varied settings of a trial by intervals of steps; one interval where it was never replaced by another's copy."""
        keys = dict.fromkeys(key for entry in self.trials for key in entry.settings if key != "budget")
        points = {entry.name: values_at(self.planned(entry.name), keys) for entry in self.trials}
        return intervals(points, self.rungs, trial)

    def planned(self, trial: str) -> dict[str, Any]:
        """The settings of one of its trials as its file has them: those of the sweep, with what varies in it."""
        recipe: dict[str, Any] = copy.deepcopy(self.experiment)
        entry = next((each for each in self.trials if each.name == trial), None)
        settings = {key: value for key, value in (entry.settings if entry else {}).items() if key != "budget"}
        if entry is not None and entry.steps is not None:
            settings["training.steps"] = entry.steps
        for key, value in settings.items():
            *sections, last = key.split(".")
            at = recipe
            for section in sections:
                at = at.setdefault(section, {})
            at[last] = value
        return recipe

    def trained_by(self, project: ProjectFolder, code: Code) -> None:
        """Note that this code trains the sweep from here on, with its files beside the record."""
        if self.code[-1:] != [code.digest]:
            self.code.append(code.digest)
            write_json(project.sweep(self.id) / CODE, dict(code.files))

    def other_files(self, project: ProjectFolder, code: Code) -> list[str]:
        """Source files that differ between this code and that which trained the sweep last.

        Empty where none do, and for a sweep of an earlier version, which kept no digests.
        """
        if self.code[-1:] in ([], [code.digest]):
            return []
        return Code(read_json(project.sweep(self.id) / CODE) or {}).differing(code)

    def checkpoints(self, project: ProjectFolder, trial: str) -> CheckpointStore:
        """The checkpoints of one of its trials."""
        base = self.experiment["training"].get("checkpoints")
        return CheckpointStore.of_trial(project, self.id, trial, base)

    def steps(self, trial: str) -> int:
        """The optimizer steps of one of its trials."""
        entry = next(each for each in self.trials if each.name == trial)
        return int(entry.steps or self.experiment["training"]["steps"])

    def save(self, storage: ProjectFolder) -> None:
        """Write sweep.json."""
        write_json(
            storage.sweep(self.id) / RECORD,
            {**asdict(self), "best": None if self.best is None else self.best.as_json()},
        )


@dataclass
class _StoredRecord(SweepRecord):
    """sweep.json as it is read: its parts are still JSON objects."""

    trials: list[dict[str, Any]]  # type: ignore[assignment]
    best: dict[str, Any] | None = None  # type: ignore[assignment]
    rungs: list[dict[str, Any]] = field(default_factory=list)  # type: ignore[assignment]


def load_record(storage: ProjectFolder, sweep: str) -> SweepRecord | None:
    """The record of a sweep; None where it was never started.

    Raises InputError where the file is damaged or of a newer format.
    """
    path = storage.sweep(sweep) / RECORD
    stored = read_record(path, _StoredRecord)
    if stored is None:
        return None
    trials = [record_of(each, TrialEntry, f"a trial in {path}") for each in stored.trials]
    best = None if stored.best is None else record_of(stored.best, BestTrial, f"the best trial in {path}")
    return SweepRecord(
        **{
            **vars(stored),
            "trials": trials,
            "best": best,
            "rungs": [_rung(each, path) for each in stored.rungs],
        }
    )


def _rung(stored: Any, path: Path) -> Rung:
    rung = record_of(stored, Rung, f"a rung in {path}")
    return replace(
        rung, replaced=[record_of(each, Replacement, f"a rung in {path}") for each in rung.replaced]
    )


def all_records(storage: ProjectFolder) -> list[SweepRecord]:
    """Every sweep of a project folder, newest first."""
    records = (load_record(storage, path.parent.name) for path in storage.sweeps.glob(f"*/{RECORD}"))
    return sorted((r for r in records if r), key=lambda r: -r.created)


def sweep_id(storage: ProjectFolder, experiment: Experiment, again: bool) -> str:
    """The sweep these settings belong to: the same settings go on with the same sweep.

    With `again`, a sweep that is finished or that other code has trained is left as it is, and the next one of the same settings is
    taken.
    """
    base = f"{experiment.name}-{experiment.digest()}"
    if not again:
        return base
    count = 1
    chosen = base
    while (record := load_record(storage, chosen)) is not None and (
        record.finished or record.other_files(storage, running_code())
    ):
        count += 1
        chosen = f"{base}-{count}"
    return chosen


def new_or_resumed_record(
    existing: SweepRecord | None, sweep: str, file: str, experiment: Experiment, trials: Sequence[Trial]
) -> SweepRecord:
    """The record of a sweep that is to be started: a new one, or the existing one with the settings of this start."""
    settings: dict[str, Any] = {
        "file": file,
        "experiment": experiment.resolved(),
        "trials": [TrialEntry.of(trial) for trial in trials],
        "metric": experiment.search.metric,
        "mode": experiment.mode,
    }
    if existing is not None:
        return replace(existing, **settings)
    return SweepRecord(id=sweep, name=experiment.name, **settings)


@contextlib.contextmanager
def lock_sweep(storage: ProjectFolder, sweep: str) -> Iterator[None]:
    """Hold a sweep for the length of a block; the lock ends with the process, however it ends.

    Raises UserError where another command runs the same sweep.
    """
    with locked(storage.sweep(sweep) / LOCK) as acquired:
        if not acquired:
            raise UserError(
                f"sweep {sweep} is running in another process: wait for it, or see it with `soflowctl status`."
            )
        yield


def require_unchanged(storage: ProjectFolder, sweep: str, known: SweepRecord | None) -> None:
    """Raises UserError where the record of a sweep is not the one that was read before its lock was taken, None for none.

    Another command has run the sweep between the two: the trials and rungs that it added, and its result, would be written over.
    """

    def content(record: SweepRecord | None) -> str:
        # Digests of code of which nothing is left are dropped by who reads them. As text, in which NaN is equal to NaN.
        return "" if record is None else json.dumps(asdict(replace(record, code=[])), sort_keys=True)

    if content(load_record(storage, sweep)) != content(known):
        raise UserError(f"sweep {sweep} was run by another command meanwhile: run the same command again.")


def is_running(storage: ProjectFolder, sweep: str) -> bool:
    """Whether a process holds the sweep's lock."""
    return is_locked(storage.sweep(sweep) / LOCK)
