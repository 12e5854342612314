"""What is known of a sweep on disk: enough to go on with it after its driver was killed."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.errors import UserError
from soflow_platform.registry.candidate import Candidate
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder

if TYPE_CHECKING:
    from soflow_platform.config.experiment import Experiment
    from soflow_platform.tuning.search_space import Trial

RECORD = "sweep.json"
LOCK_RETRY_SECONDS = 0.5
"""Longer than `is_running` holds the lock in passing."""


@dataclass
class SweepRecord:
    """`sweeps/<id>/sweep.json`."""

    id: str
    name: str
    file: str
    experiment: dict[str, Any]
    trials: list[dict[str, Any]]
    """Name, settings and optimizer steps of each."""
    metric: str
    """What trials are compared by."""
    mode: str
    """`min` or `max`: which value of it is better."""
    created: float = field(default_factory=time.time)
    attempts: int = 0
    """How often a driver started on it."""
    run: str | None = None
    """MLflow id of the parent run."""
    experiment_id: str | None = None
    """MLflow id of the experiment."""
    tracking_uri: str | None = None
    finished: bool = False
    best: dict[str, Any] | None = None
    """The best trial: its name, step, metrics, grid and registered version."""

    def candidate(self, model: str) -> Candidate:
        """The best evaluation, to be registered under this name. Raises ValueError where there is none yet."""
        if self.best is None:
            raise ValueError(f"sweep {self.id} has no best trial yet")
        return Candidate(
            model=model,
            sweep=self.id,
            trial=self.best["trial"],
            step=self.best["step"],
            metric=self.metric,
            mode=self.mode,
            metrics=self.best["metrics"],
        )

    def checkpoints(self, project: ProjectFolder, trial: str) -> CheckpointStore:
        """The checkpoints of one of its trials."""
        base = self.experiment["training"].get("checkpoints")
        return CheckpointStore.of_trial(project, self.id, trial, base)

    def save(self, storage: ProjectFolder) -> None:
        write_json(storage.sweep(self.id) / RECORD, asdict(self))


def load_record(storage: ProjectFolder, sweep: str) -> SweepRecord | None:
    """The record of a sweep, if it was ever started."""
    content = read_json(storage.sweep(sweep) / RECORD)
    return SweepRecord(**content) if content else None


def all_records(storage: ProjectFolder) -> list[SweepRecord]:
    """Every sweep of a project folder, newest first."""
    records = (load_record(storage, path.parent.name) for path in storage.sweeps.glob(f"*/{RECORD}"))
    return sorted((r for r in records if r), key=lambda r: -r.created)


def sweep_id(storage: ProjectFolder, experiment: Experiment, again: bool) -> str:
    """The sweep these settings belong to: the same settings go on with the same sweep.

    With `again`, a finished sweep is left as it is and the next one of the same settings is taken.
    """
    base = f"{experiment.name}-{experiment.digest()}"
    if not again:
        return base
    count = 1
    chosen = base
    while (record := load_record(storage, chosen)) is not None and record.finished:
        count += 1
        chosen = f"{base}-{count}"
    return chosen


def new_or_resumed_record(
    known: SweepRecord | None, sweep: str, file: str, experiment: Experiment, points: Sequence[Trial]
) -> SweepRecord:
    """The record of a sweep that is to be started: what is known of it, with the settings of this start."""
    settings: dict[str, Any] = {
        "file": file,
        "experiment": experiment.resolved(),
        "trials": [
            {"name": t.name, "settings": t.settings, "steps": t.experiment.training.steps} for t in points
        ],
        "metric": experiment.search.metric,
        "mode": experiment.mode,
    }
    if known is not None:
        return replace(known, **settings)
    return SweepRecord(id=sweep, name=experiment.name, **settings)


@contextlib.contextmanager
def lock_sweep(storage: ProjectFolder, sweep: str) -> Iterator[None]:
    """Hold a sweep for the length of a block; the hold ends with the process, however it ends.

    Raises UserError where another command runs the same sweep.
    """
    folder = storage.sweep(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        end = time.monotonic() + LOCK_RETRY_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise UserError(
                        f"sweep {sweep} is running in another process: wait for it, or see it with `soflowctl status`."
                    ) from None
            time.sleep(0.05)
        yield


def is_running(storage: ProjectFolder, sweep: str) -> bool:
    """Whether some process holds the sweep."""
    try:
        with (storage.sweep(sweep) / ".lock").open() as lock:
            # Shared, so that two who look at the same time do not take each other for the sweep.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
