"""What rank 0 tells of its trial while it trains: the trial's log and status files, and the sweep's board."""

from __future__ import annotations

import logging
import os
import socket
import time
from enum import Enum
from pathlib import Path
from typing import Any

from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.training.trial_log import LOG, TrialLog

STATUS = "status.json"
PROGRESS_SECONDS = 0.5
"""How often the terminal hears where a worker is."""
STATUS_SECONDS = 2.0
"""How often the status file is written."""
LINE_SECONDS = 30.0
"""How often the log gets a line of progress."""


class TrialState(str, Enum):
    """What a trial does, or how it ended; the values are those of status files and of the command line."""

    NOT_STARTED = "not started"
    WAITING = "waiting"
    """Its sweep runs, it does not yet."""
    STARTING = "starting"
    RESTARTING = "restarting"
    """Its workers were lost and new ones are started."""
    RUNNING = "running"
    EVALUATING = "evaluating"
    STOPPING = "stopping"
    """Asked to stop; it finishes its step and saves."""
    STOPPED = "stopped"
    """It was asked to stop and did; the same command goes on."""
    PRUNED = "pruned"
    """The scheduler ended it before its last step."""
    FINISHED = "finished"
    FAILED = "failed"
    CUT = "cut"
    """Its sweep's command ended without a word of this trial; the same command goes on."""

    def __str__(self) -> str:
        return self.value


class TrialStatusWriter:
    """The voice of one trial. Nothing it cannot say stops the training."""

    def __init__(self, folder: Path, trial: str, steps: int, attempt: int, board: Any = None) -> None:
        self.folder, self.trial, self.board = folder, trial, board
        self._journal = TrialLog(folder / LOG)
        self._status: dict[str, Any] = {
            "state": "starting",
            "step": 0,
            "steps": steps,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "attempt": attempt,
            "first_attempt": self._first_attempt(attempt),
        }
        self._told = self._written = self._line = 0.0

    def _first_attempt(self, attempt: int) -> int:
        try:
            told = read_json(self.folder / STATUS) or {}
        except (OSError, ValueError):
            return attempt
        return int(told.get("first_attempt", attempt))

    def log(self, text: str, step: int | None = None) -> None:
        """One line in the trial's log."""
        try:
            self._journal.write(text, step)
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: %s (its log cannot be written: %s)", self.trial, text, error
            )

    def set_state(self, state: str, **changes: Any) -> None:
        """What the trial does now; told at once."""
        self._status.update(changes, state=state)
        self._to_board({"state": state, **{k: v for k, v in changes.items() if k == "step"}})
        self._write_status()

    def progress(self, step: int, images: int, rate: float, loss: float, eta_seconds: float | None) -> None:
        """Where the trial is; told every so often."""
        self._status.update(
            state="running",
            step=step,
            images=images,
            images_per_second=rate,
            loss=loss,
            eta_seconds=eta_seconds,
        )
        now = time.monotonic()
        if now - self._told > PROGRESS_SECONDS:
            self._told = now
            self._to_board(
                {
                    "state": "running",
                    "step": step,
                    "images_per_second": rate,
                    "loss": loss,
                    "eta_seconds": eta_seconds,
                }
            )
        if now - self._written > STATUS_SECONDS:
            self._write_status()
        if now - self._line > LINE_SECONDS:
            self._line = now
            left = "" if eta_seconds is None else f", {eta_seconds / 60:.1f} min left"
            self.log(f"loss {loss:.4g}, {rate:,.0f} images/s{left}", step)

    def furthest_step(self) -> int:
        """The furthest step that any life of this trial has finished, as far as its status file knows."""
        try:
            told = read_json(self.folder / STATUS) or {}
        except (OSError, ValueError):
            return 0
        return max(int(told.get("reached", 0)), int(told.get("step", 0)))

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Scores of one step."""
        self.log(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), step)
        if self.board is not None:
            self.board.add_evaluation.remote(self.trial, step, metrics)

    def fail(self, sentence: str, **changes: Any) -> None:
        """Why the trial cannot go on, where starting it again would not help."""
        self.log(sentence)
        self.set_state(TrialState.FAILED, failure=sentence, **changes)
        if self.board is not None:
            import ray

            ray.get(self.board.update.remote(self.trial, {"failure": sentence}))

    def _to_board(self, changes: dict[str, Any]) -> None:
        if self.board is not None:
            self.board.update.remote(self.trial, changes)

    def _write_status(self) -> None:
        self._written = time.monotonic()
        reached = max(self.furthest_step(), self._status["step"])
        try:
            write_json(self.folder / STATUS, {**self._status, "reached": reached, "updated": time.time()})
        except OSError as error:
            logging.getLogger(__name__).warning("%s: its status cannot be written: %s", self.trial, error)
