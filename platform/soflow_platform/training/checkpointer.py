"""Checkpoints in the background: training goes on while the last one is written, checked and published."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import CheckpointState, CheckpointStore
from soflow_platform.storage.retry import retry

STUCK_POLL_SECONDS = 0.05
"""How often a checkpoint that waits for the one before looks whether that is stuck."""


@dataclass
class AsyncCheckpointer:
    """Publishes one checkpoint at a time, in order, so that one copy of the state in host memory serves all.

    A storage that cannot be written is tried again for `patience` seconds, and meanwhile training goes on without further
    checkpoints. After that the checkpoint is given up, unless it was the last one: `close` raises JobError then.
    """

    root: str
    keep: int
    patience: float
    say: Callable[[str], None]
    _thread: threading.Thread | None = None
    _failure: JobError | None = None
    _stuck: threading.Event = field(default_factory=threading.Event)
    _closing: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Return once nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def ready(self, step: int, needed: bool) -> bool:
        """Wait until the checkpoint of `step` can be made; one that is not `needed` is left out while the storage is away."""
        while not needed and self._thread is not None and self._thread.is_alive():
            if self._stuck.is_set():
                self.say(f"no checkpoint of step {step:,}: the one before it is still being tried")
                return False
            self._thread.join(STUCK_POLL_SECONDS)
        self.wait()
        return True

    def submit(
        self, position: CheckpointState, ranking: Sequence[int], write: Callable[[Path], None]
    ) -> None:
        """Publish what `write(folder)` writes, and remove what is no longer kept; returns at once if nothing is being written.

        `ranking` are the scored steps, best first.
        """
        self.wait()
        self._failure = None
        self._stuck.clear()
        self._thread = threading.Thread(
            target=self._work, args=(position, ranking, write), name="checkpoint", daemon=True
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

    def _work(self, position: CheckpointState, ranking: Sequence[int], write: Callable[[Path], None]) -> None:
        started = time.monotonic()
        what = f"saving the checkpoint of step {position.step:,} to {self.root}"
        try:
            retry(
                lambda: self._publish(position, write), what, self.patience, self.say, cancelled=self._closing
            )
        except BaseException as error:
            # A thread of its own has nobody to raise to: told here, and raised by `close`.
            failure = error if isinstance(error, JobError) else JobError(f"{what} failed: {error!r}")
            self._failure = failure
            self.say(f"{failure}; the checkpoints before it are kept.")
            return
        self._stuck.clear()
        self.say(f"checkpoint of step {position.step:,} saved in {time.monotonic() - started:.1f} s")
        try:
            CheckpointStore(self.root).prune(self.keep, ranking)
        except Exception as error:
            self.say(f"old checkpoints in {self.root} cannot be removed and take space: {error}")

    def _publish(self, position: CheckpointState, write: Callable[[Path], None]) -> None:
        try:
            CheckpointStore(self.root).publish(position, write)
        except BaseException:
            self._stuck.set()
            raise
