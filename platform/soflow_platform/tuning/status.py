"""Where the trials of a sweep stand, read from files of the project folder alone: any machine that sees the folder can tell.

A trial's first worker writes `status.json` every few seconds. A process that was killed writes no last word, so what is read here is
weighed against the time of writing and against the lock that a running sweep holds.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soflow_pipelines.storage.files import read_json
from soflow_platform.storage.checkpoints import RECORD, trial_root
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_status import STATUS
from soflow_platform.tuning.lookup import trial_names
from soflow_platform.tuning.record import SweepRecord, is_running

STALE_SECONDS = 60.0
"""A status older than this is called silent; workers write theirs every few seconds."""
ENDED = ("finished", "stopped", "failed")
"""States that a trial does not leave until the sweep is started again."""


@dataclass(frozen=True)
class TrialStatus:
    """One trial of a sweep. What is not known is None."""

    sweep: str
    trial: str
    state: str
    """While the sweep runs `waiting`, what its workers tell (`starting`, `running`, `evaluating`, ...) or `stopping`; `finished`,
    `stopped` or `failed`; and where the sweep ended before the trial could say so `cut` or `not started`."""
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
    """Step of the newest checkpoint, where checkpoints lie in a folder."""
    heartbeat_seconds: float | None
    """Age of the status file's content."""
    silent: bool
    """Whether a trial that should be running has not been heard of for a minute."""
    restarts: int
    """How often the sweep was started again since this trial's first start."""
    host: str | None
    pid: int | None
    """Of the first worker."""


def trial_statuses(storage: ProjectFolder, record: SweepRecord, trials: list[str]) -> list[TrialStatus]:
    """Where the named trials of a sweep stand."""
    running = sweep_runs(storage, record)
    return [_trial_status(storage, record, trial, running) for trial in trials]


def sweep_state(storage: ProjectFolder, record: SweepRecord) -> str:
    """`running`, `stopping`, `finished`, `stopped` (because that was asked for) or `cut`."""
    if sweep_runs(storage, record):
        return "stopping" if stop_requested(storage, record.id) else "running"
    if record.finished:
        return "finished"
    return "stopped" if stop_requested(storage, record.id) else "cut"


def sweep_runs(storage: ProjectFolder, record: SweepRecord) -> bool:
    """Whether the sweep's command is running, here or on another machine.

    Where a shared file system keeps no locks between machines, a trial on another machine that was heard of within the last
    minute counts as well.
    """
    if is_running(storage, record.id):
        return True
    here = socket.gethostname()
    for trial in trial_names(record):
        status = _read(storage, record.id, trial)
        elsewhere = status.get("host") not in (None, here)
        if elsewhere and status.get("state") not in ENDED and _age(status) < STALE_SECONDS:
            return True
    return False


def _trial_status(storage: ProjectFolder, record: SweepRecord, trial: str, running: bool) -> TrialStatus:
    told = _read(storage, record.id, trial)
    if running and told.get("attempt", record.attempts) < record.attempts and told.get("state") != "finished":
        # Said before the sweep was started again.
        told = {k: v for k, v in told.items() if k in ("step", "steps", "images", "attempt", "first_attempt")}
    checkpoint = _checkpoint_step(storage, record, trial)
    steps = told.get("steps") or trial_steps(record, trial)
    begun = "state" in told or checkpoint is not None
    state = _state(told.get("state"), running, record, begun, checkpoint == steps)
    if running and state not in ENDED and stop_requested(storage, record.id, trial):
        state = "stopping"
    live = running and state not in ENDED
    heartbeat = _age(told) if "updated" in told else None
    return TrialStatus(
        sweep=record.id,
        trial=trial,
        state=state,
        step=told.get("step", checkpoint or 0),
        steps=steps,
        images=told.get("images"),
        images_per_second=told.get("images_per_second") if live else None,
        eta_seconds=told.get("eta_seconds") if live else None,
        loss=told.get("loss"),
        checkpoint_step=checkpoint,
        heartbeat_seconds=heartbeat,
        silent=live and heartbeat is not None and heartbeat > STALE_SECONDS,
        restarts=max(0, told.get("attempt", 1) - told.get("first_attempt", 1)),
        host=told.get("host"),
        pid=told.get("pid"),
    )


def _state(told: str | None, running: bool, record: SweepRecord, begun: bool, complete: bool) -> str:
    if told in ENDED:
        return str(told)
    if running:
        return told or "waiting"
    if complete:
        return "finished"
    if record.finished:
        # The scheduler ended it, without a last word of its own.
        return "stopped"
    return "cut" if begun else "not started"


def _read(storage: ProjectFolder, sweep: str, trial: str) -> dict[str, Any]:
    return read_json(storage.trial(sweep, trial) / STATUS) or {}


def _age(status: dict[str, Any]) -> float:
    """Seconds since a status was written; clocks of two machines may differ, so it is never below 0."""
    return max(0.0, time.time() - float(status.get("updated", 0.0)))


def _checkpoint_step(storage: ProjectFolder, record: SweepRecord, trial: str) -> int | None:
    root = trial_root(record.experiment["training"].get("checkpoints"), storage, record.id, trial)
    if "://" in root:
        # Listing a remote storage takes seconds, or minutes where it is away.
        return None
    found = [path.parent.name for path in Path(root).glob(f"step-*/{RECORD}")]
    return max((int(name.removeprefix("step-")) for name in found), default=None)


def trial_steps(record: SweepRecord, trial: str) -> int:
    """The trial's own number of optimizer steps, where it differs from the sweep's."""
    own = next(t for t in record.trials if t["name"] == trial)
    return int(own.get("steps", record.experiment["training"]["steps"]))
