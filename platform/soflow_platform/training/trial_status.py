"""State of one trial: the schema of status.json, and the writer that publishes it while the trial runs.

The status file of a trial, the sweep's progress actor and `soflowctl status` all hold a `TrialStatus`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from soflow_core.failures import InputError
from soflow_pipelines.storage.files import write_bytes, write_json
from soflow_platform.storage.records import read_record
from soflow_platform.training.trial_log import LOG, TrialLog

STATUS = "status.json"
FAILURE = "failure.txt"
"""Name of the file in a trial's folder with the traceback of its last failure."""
ACTOR_SECONDS = 0.5
"""Interval at which progress is sent to the progress actor."""
STATUS_SECONDS = 2.0
"""Interval at which the status file is written."""
LINE_SECONDS = 30.0
"""Interval at which a line of progress is logged."""


class TrialState(str, Enum):
    """State of a trial. The values are those in status files and on the command line."""

    NOT_STARTED = "not started"
    WAITING = "waiting"
    """Its sweep runs; the trial has not started, or waits at a rung for the others of its population."""
    STARTING = "starting"
    RESTARTING = "restarting"
    """Its workers were lost and new ones are started."""
    RUNNING = "running"
    EVALUATING = "evaluating"
    STOPPING = "stopping"
    """Asked to stop; it finishes its step and saves."""
    STOPPED = "stopped"
    """It was asked to stop and did; the same command resumes it. Earlier versions also wrote this for a pruned trial."""
    PRUNED = "pruned"
    """The scheduler ended it before its last step."""
    FINISHED = "finished"
    FAILED = "failed"
    CUT = "cut"
    """Its sweep's command ended before the trial did; the same command resumes it."""

    def __str__(self) -> str:
        return self.value

    @property
    def ended(self) -> bool:
        """Whether the trial keeps this state until its sweep is started again."""
        return self in (TrialState.FINISHED, TrialState.STOPPED, TrialState.PRUNED, TrialState.FAILED)

    @property
    def without_workers(self) -> bool:
        """Whether a trial whose driver runs waits for machines."""
        return self in (TrialState.STARTING, TrialState.RESTARTING)


@dataclass(frozen=True)
class TrialStatus:
    """Status of one trial. A value that is not available is None."""

    state: TrialState = TrialState.WAITING
    step: int = 0
    """Finished optimizer steps."""
    steps: int | None = None
    """Optimizer steps in all."""
    images: int | None = None
    """Samples seen."""
    images_per_second: float | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    """Estimated seconds to the last step."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The latest evaluation."""
    scored_step: int = 0
    """Step of the latest evaluation."""
    failure: str | None = None
    """Why the trial cannot go on, where restarting it would not help."""
    own_fault: bool | None = None
    """Whether it failed by its own settings, code or size, which another start would meet again, and not by a machine, a storage or
    input that can be mended; None in a file of an earlier version."""
    lost: str | None = None
    """The workers that were lost last, by rank."""
    trouble: str | None = None
    """What keeps it from saving or from logging, as long as that lasts: a full disk, a server that is away."""
    host: str | None = None
    pid: int | None = None
    """Process id of rank 0, or of the trial's driver before there are workers."""
    attempt: int | None = None
    """Number of the sweep's start in which this was written."""
    first_attempt: int | None = None
    """Number of the sweep's start in which the trial first ran."""
    reached: int = 0
    """The furthest step that any attempt finished."""
    since: float | None = None
    """When the state began, in seconds since 1970, by the progress actor's clock."""
    updated: float | None = None
    """When the status file was written, in seconds since 1970."""

    def as_json(self) -> dict[str, Any]:
        """The JSON object of a status file, without values that are None."""
        return {**{k: v for k, v in asdict(self).items() if v not in (None, {})}, "state": str(self.state)}


def read_status(folder: Path) -> TrialStatus | None:
    """The status file of a trial's folder; None where there is none. Raises InputError where it holds no status, OSError where it
    cannot be read.
    """
    return read_record(folder / STATUS, TrialStatus)


def progress_actor(sweep: str) -> Any:
    """Handle of a running sweep's progress actor, from any process of its cluster."""
    import ray

    return ray.get_actor(progress_actor_name(sweep), namespace="soflow")


def progress_actor_name(sweep: str) -> str:
    """Name of the actor in Ray's namespace."""
    return f"progress-{sweep}"


class TrialStatusWriter:
    """Publishes a trial's state to status.json, log.txt and the progress actor.

    I/O errors are logged and never end the training.
    """

    def __init__(self, folder: Path, trial: str, steps: int, attempt: int, actor: Any = None) -> None:
        self.folder, self.trial, self.actor = folder, trial, actor
        self._log = TrialLog(folder / LOG)
        before = self._before()
        first = attempt if before.first_attempt is None else before.first_attempt
        self._status = TrialStatus(
            state=TrialState.STARTING,
            steps=steps,
            host=socket.gethostname(),
            pid=os.getpid(),
            attempt=attempt,
            first_attempt=first,
        )
        self._troubles: dict[str, str] = {}
        self._sent = self._written = self._line = 0.0

    def _before(self) -> TrialStatus:
        """The content of the status file; an initial status where there is none or it cannot be read."""
        try:
            return read_status(self.folder) or TrialStatus()
        except (OSError, InputError):
            return TrialStatus()

    def log(self, text: str, step: int | None = None) -> None:
        """Append one line to the trial's log."""
        try:
            self._log.write(text, step)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: %s (its log cannot be written: %s)", self.trial, text, error
            )

    def report(self, what: str, trouble: str | None) -> None:
        """Publish what keeps checkpoints, or curves, from being written, None where nothing does. Any thread may call it."""
        if trouble == self._troubles.get(what):
            return
        self._troubles = {key: text for key, text in self._troubles.items() if key != what}
        if trouble is not None:
            self._troubles[what] = trouble
        self._send({"trouble": self._trouble()})
        self._write_status()

    def _trouble(self) -> str | None:
        return "; ".join(self._troubles.values()) or None

    def set_state(
        self,
        state: TrialState,
        step: int | None = None,
        failure: str | None = None,
        own_fault: bool | None = None,
    ) -> None:
        """Publish a change of state at once."""
        changes: dict[str, Any] = {"state": state}
        if step is not None:
            changes["step"] = step
        self._send(changes)
        self._status = replace(self._status, **changes, failure=failure, own_fault=own_fault)
        self._write_status()

    def progress(self, step: int, images: int, rate: float, loss: float, eta_seconds: float | None) -> None:
        """Publish a finished step, not more often than the intervals above."""
        changes: dict[str, Any] = {
            "state": TrialState.RUNNING,
            "step": step,
            "images": images,
            "images_per_second": rate,
            "loss": loss,
            "eta_seconds": eta_seconds,
        }
        self._status = replace(self._status, **changes)
        now = time.monotonic()
        if now - self._sent > ACTOR_SECONDS:
            self._sent = now
            self._send(changes)
        if now - self._written > STATUS_SECONDS:
            self._write_status()
        if now - self._line > LINE_SECONDS:
            self._line = now
            left = "" if eta_seconds is None else f", {eta_seconds / 60:.1f} min left"
            self.log(f"loss {loss:.4g}, {rate:,.0f} images/s{left}", step)

    def furthest_step(self) -> int:
        """The furthest step that any attempt of this trial finished, according to its status file."""
        before = self._before()
        return max(before.reached, before.step)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Publish the scores of one step."""
        self.log(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), step)
        self._status = replace(self._status, metrics=metrics, scored_step=step)
        if self.actor is not None:
            self.actor.add_evaluation.remote(self.trial, step, metrics)

    def fail(
        self, sentence: str, step: int | None = None, traceback: str | None = None, own_fault: bool = False
    ) -> None:
        """Publish why the trial cannot go on, where starting it again would not help."""
        self._keep_traceback(sentence, traceback)
        self.log(sentence)
        self.set_state(TrialState.FAILED, step, sentence, own_fault)
        if self.actor is not None:
            import ray

            # Wait until the actor has it: the process may end next, and a message that was not received would be lost.
            ray.get(self.actor.update.remote(self.trial, {"failure": sentence}))

    def _keep_traceback(self, sentence: str, traceback: str | None) -> None:
        try:
            if traceback is not None:
                self._log.write_block(traceback)
            write_bytes(self.folder / FAILURE, (traceback or f"{sentence}\n").encode())
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: %s (its log cannot be written: %s)", self.trial, traceback or sentence, error
            )

    def _send(self, changes: dict[str, Any]) -> None:
        if self.actor is not None:
            self.actor.update.remote(self.trial, changes)

    def _write_status(self) -> None:
        self._written = time.monotonic()
        reached = max(self.furthest_step(), self._status.step)
        status = replace(self._status, reached=reached, trouble=self._trouble(), updated=time.time())
        try:
            write_json(self.folder / STATUS, status.as_json())
        except OSError as error:
            logging.getLogger(__name__).warning("%s: its status cannot be written: %s", self.trial, error)
