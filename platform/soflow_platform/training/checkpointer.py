"""Writes checkpoints in a background thread while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from soflow_platform.errors import JobError
from soflow_platform.storage.background import BackgroundQueue
from soflow_platform.storage.checkpoints import CheckpointState, CheckpointStore, WriteFiles
from soflow_platform.storage.retry import Report, retry, unreported

STUCK_POLL_SECONDS = 0.05
"""Interval at which `ready` checks whether the checkpoint that it waits for is stuck."""


class AsyncCheckpointer:
    """Publishes one checkpoint at a time, in order, so that a single copy of the state in host memory is enough.

    A write that fails is retried for `patience` seconds, and training goes on meanwhile without further checkpoints. After that
    the checkpoint is given up and training goes on; if it was the last one, `close` raises JobError.
    """

    def __init__(
        self,
        store: CheckpointStore,
        keep: int,
        patience: float,
        log: Callable[[str], None],
        report: Report = unreported,
    ) -> None:
        """`report` has what keeps a checkpoint from being saved."""
        self.store, self.keep, self.patience = store, keep, patience
        self._log, self._report = log, report
        self._queue = BackgroundQueue("checkpoint")
        self._stuck = threading.Event()
        """Set once writing the present checkpoint has failed and is being retried."""

    def ready(self, step: int, needed: bool) -> bool:
        """Wait until the checkpoint of `step` can be made. Returns False for one not `needed` while the one before it is stuck."""
        while not needed and not self._queue.drain(STUCK_POLL_SECONDS):
            if self._stuck.is_set():
                self._log(f"no checkpoint of step {step:,}: the one before it is still being tried")
                return False
        self._queue.drain()
        return True

    def submit(self, state: CheckpointState, ranking: Sequence[int], write: WriteFiles) -> None:
        """Publish the checkpoint whose files `write` writes, after the one before it, and remove those that are no longer kept.

        `ranking` are the scored steps, best first.
        """
        self._queue.drain()
        self._queue.take_failure()
        self._stuck.clear()
        self._queue.submit(lambda: self._save(state, ranking, write))

    def drain(self) -> None:
        """Wait until nothing is being written."""
        self._queue.drain()

    def close(self) -> None:
        """Wait for the last checkpoint. Raises JobError where it could not be published."""
        self._queue.close()

    def abandon(self) -> None:
        """Wait for the present checkpoint without retrying a failed write, which is logged and not raised."""
        self._queue.abandon()

    def _save(self, state: CheckpointState, ranking: Sequence[int], write: WriteFiles) -> None:
        started = time.monotonic()
        description = f"saving the checkpoint of step {state.step:,} to {self.store.root}"
        try:
            retry(
                lambda: self._publish(state, write),
                description=description,
                timeout=self.patience,
                log=self._log,
                report=self._report,
                cancel=self._queue.cancelled,
            )
        except BaseException as error:
            failure = error if isinstance(error, JobError) else JobError(f"{description} failed: {error!r}")
            self._log(f"{failure}; the checkpoints before it are kept.")
            raise failure from error
        self._stuck.clear()
        self._log(f"checkpoint of step {state.step:,} saved in {time.monotonic() - started:.1f} s")
        try:
            self.store.prune(self.keep, ranking)
        except Exception as error:
            self._log(f"old checkpoints in {self.store.root} cannot be removed and take space: {error}")

    def _publish(self, state: CheckpointState, write: WriteFiles) -> None:
        try:
            self.store.publish(state, write)
        except BaseException:
            self._stuck.set()
            raise
