"""Status of a sweep and of its trials, derived from files of the project folder alone, on any machine that sees it.

A trial's first worker writes `status.json` every few seconds. A process that was killed leaves its last status behind, so the state
that is shown is derived from it together with its age, the trial's checkpoints, and the lock that a running sweep holds.
"""

from __future__ import annotations

import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from soflow_platform.storage.checkpoints import RECORD
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_status import TrialState, TrialStatus, read_status
from soflow_platform.tuning.lookup import trial_names
from soflow_platform.tuning.record import SweepRecord, is_running

STALE_SECONDS = 60.0
"""A status older than this is stale; workers write theirs every few seconds."""


@dataclass(frozen=True)
class TrialReport:
    """One trial as `soflowctl status` shows it. A value that is not available is None."""

    sweep: str
    trial: str
    state: TrialState
    step: int
    """Finished optimizer steps, at the last heartbeat."""
    steps: int
    """Optimizer steps in all."""
    images: int | None
    """Samples seen."""
    images_per_second: float | None
    eta_seconds: float | None
    """Seconds to the last step; None where the trial does not run."""
    loss: float | None
    checkpoint_step: int | None
    """Step of the newest checkpoint; None where checkpoints are kept in S3."""
    heartbeat_seconds: float | None
    """Age of the status file's content."""
    stale: bool
    """True where a trial that should be running has not written its status for STALE_SECONDS."""
    restarts: int
    """How often the sweep was started again since this trial's first start."""
    host: str | None
    pid: int | None
    """Process id of the first worker."""

    def as_json(self) -> dict[str, Any]:
        """The object that `soflowctl status --json` prints."""
        # Scripts read the key `silent`, which the column had before it was renamed.
        return {"silent" if key == "stale" else key: value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class TrialFacts:
    """The facts from which a trial's state is derived."""

    written: TrialState | None
    """The state in its status file, where there is one of the sweep's present start."""
    sweep_runs: bool
    sweep_finished: bool
    stop_requested: bool
    begun: bool
    """Whether it has a status or a checkpoint."""
    complete: bool
    """Whether it has a checkpoint of its last step."""


def derive_state(facts: TrialFacts) -> TrialState:
    """The state of a trial: that of the first row whose condition holds."""
    written = facts.written
    rows = (
        (written is not None and written.ended, written),
        (facts.sweep_runs and facts.stop_requested, TrialState.STOPPING),
        (facts.sweep_runs, written or TrialState.WAITING),
        (facts.complete, TrialState.FINISHED),
        # A sweep is finished when its scheduler has ended every trial that has not reached its last step.
        (facts.sweep_finished, TrialState.PRUNED),
        (facts.begun, TrialState.CUT),
    )
    return next((state for holds, state in rows if holds and state is not None), TrialState.NOT_STARTED)


def trial_reports(storage: ProjectFolder, record: SweepRecord, trials: list[str]) -> list[TrialReport]:
    """Reports on the named trials of a sweep."""
    running = sweep_runs(storage, record)
    return [_trial_report(storage, record, trial, running) for trial in trials]


def sweep_state(storage: ProjectFolder, record: SweepRecord) -> TrialState:
    """State of a sweep: RUNNING, STOPPING, FINISHED, STOPPED (after a request), FAILED (a trial failed) or CUT."""
    asked = stop_requested(storage, record.id)
    if sweep_runs(storage, record):
        return TrialState.STOPPING if asked else TrialState.RUNNING
    if record.finished:
        return TrialState.FINISHED
    if asked:
        return TrialState.STOPPED
    return TrialState.FAILED if _has_failed_trial(storage, record) else TrialState.CUT


def _has_failed_trial(storage: ProjectFolder, record: SweepRecord) -> bool:
    statuses = (read_status(storage.trial(record.id, trial)) for trial in trial_names(record))
    return any(status is not None and status.state is TrialState.FAILED for status in statuses)


def sweep_runs(storage: ProjectFolder, record: SweepRecord) -> bool:
    """Whether the sweep's command is running, here or on another machine.

    Where a shared file system keeps no locks between machines, a trial on another machine whose status was written within
    STALE_SECONDS counts as well.
    """
    if is_running(storage, record.id):
        return True
    this_host = socket.gethostname()
    for trial in trial_names(record):
        status = read_status(storage.trial(record.id, trial)) or TrialStatus()
        elsewhere = status.host not in (None, this_host)
        if elsewhere and not status.state.ended and _age(status) < STALE_SECONDS:
            return True
    return False


def _trial_report(storage: ProjectFolder, record: SweepRecord, trial: str, running: bool) -> TrialReport:
    written = read_status(storage.trial(record.id, trial))
    status = written or TrialStatus()
    attempt = record.attempts if status.attempt is None else status.attempt
    outdated = running and attempt < record.attempts and status.state is not TrialState.FINISHED
    if outdated:
        # The status was written before the sweep was started again: only its step still holds.
        status = replace(
            TrialStatus(),
            step=status.step,
            steps=status.steps,
            images=status.images,
            attempt=status.attempt,
            first_attempt=status.first_attempt,
        )
    checkpoint = _checkpoint_step(storage, record, trial)
    steps = status.steps or record.steps(trial)
    state = derive_state(
        TrialFacts(
            written=None if written is None or outdated else status.state,
            sweep_runs=running,
            sweep_finished=record.finished,
            stop_requested=stop_requested(storage, record.id, trial),
            begun=written is not None or checkpoint is not None,
            complete=checkpoint == steps,
        )
    )
    live = running and not state.ended
    heartbeat = None if status.updated is None else _age(status)
    return TrialReport(
        sweep=record.id,
        trial=trial,
        state=state,
        step=(checkpoint or 0) if written is None else status.step,
        steps=steps,
        images=status.images,
        images_per_second=status.images_per_second if live else None,
        eta_seconds=status.eta_seconds if live else None,
        loss=status.loss,
        checkpoint_step=checkpoint,
        heartbeat_seconds=heartbeat,
        # One that waits for others at a rung has no process that could say so.
        stale=live
        and state is not TrialState.WAITING
        and heartbeat is not None
        and heartbeat > STALE_SECONDS,
        restarts=max(0, (status.attempt or 1) - (status.first_attempt or 1)),
        host=status.host,
        pid=status.pid,
    )


def _age(status: TrialStatus) -> float:
    """Seconds since a status was written; clocks of two machines may differ, so it is never below 0."""
    return max(0.0, time.time() - (status.updated or 0.0))


def _checkpoint_step(storage: ProjectFolder, record: SweepRecord, trial: str) -> int | None:
    root = str(record.checkpoints(storage, trial).root)
    if "://" in root:
        # Listing a remote storage takes seconds, or minutes where it is away.
        return None
    recorded = [path.parent.name for path in Path(root).glob(f"step-*/{RECORD}")]
    return max((int(name.removeprefix("step-")) for name in recorded), default=None)
