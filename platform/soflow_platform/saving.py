"""Checkpoints in the background: training goes on while the last one is written, checked and published."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from soflow_platform import checkpoints
from soflow_platform.checkpoints import Position
from soflow_platform.errors import JobError
from soflow_platform.retries import retry


@dataclass
class CheckpointSaver:
    """Publishes one checkpoint at a time, in order, so that one copy of the state in host memory serves all.

    A storage that cannot be written is tried again for `patience` seconds. After that the checkpoint is given up and training
    goes on, unless it was the last one: `close` raises JobError then.
    """

    root: str
    keep: int
    patience: float
    say: Callable[[str], None]
    _thread: threading.Thread | None = None
    _failure: JobError | None = None
    _closing: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def submit(self, position: Position, best_step: int | None, write: Callable[[Path], None]) -> None:
        """Publish what `write(folder)` writes, and remove what is no longer kept; returns at once if nothing is being written."""
        self.wait()
        self._failure = None
        self._thread = threading.Thread(
            target=self._publish, args=(position, best_step, write), name="checkpoint", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait for the last checkpoint. Raises JobError where it could not be published."""
        self.wait()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Wait for what is being written, without trying again what fails; that is told and not raised."""
        self._closing.set()
        self.wait()

    def _publish(self, position: Position, best_step: int | None, write: Callable[[Path], None]) -> None:
        started = time.monotonic()
        what = f"saving the checkpoint of step {position.step:,} to {self.root}"
        try:
            retry(
                lambda: checkpoints.publish(self.root, position, write),
                what,
                self.patience,
                self.say,
                cancelled=self._closing,
            )
            retry(
                lambda: checkpoints.prune(self.root, self.keep, best_step),
                f"removing old checkpoints from {self.root}",
                self.patience,
                self.say,
                cancelled=self._closing,
            )
        except JobError as error:
            self._failure = error
            self.say(f"{error}; the checkpoints before it are kept.")
        else:
            self.say(f"checkpoint of step {position.step:,} saved in {time.monotonic() - started:.1f} s")
