"""Metrics and sample grids of a trial's run, sent to MLflow in the background.

A step is logged once: a trial that resumes skips the steps that its earlier attempts had logged. A tracking server that is away for
a while delays the metrics and not the training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from soflow_core.failures import summarize
from soflow_platform.errors import JobError
from soflow_platform.storage.background import BackgroundQueue
from soflow_platform.storage.retry import Report, retry, unreported
from soflow_platform.tracking.outages import is_outage
from soflow_platform.tracking.run_writer import Point, RunWriter
from soflow_platform.tracking.store import TrackingStore

if TYPE_CHECKING:
    import numpy as np

PATIENCE_SECONDS = 600.0
"""How long a tracking server may be away before logging is given up and the trial fails."""


class MetricLogger:
    """Buffers metrics with `log_metrics`, sends them in order with `send`, and waits for the server with `flush`.

    Invariant: a point is in `_points`, in order, until the server has acknowledged it; the first `_submitted` of them are in the
    queue, the others wait for the next `send`.
    """

    def __init__(
        self,
        store: TrackingStore,
        run: str,
        log: Callable[[str], None],
        patience: float = PATIENCE_SECONDS,
        report: Report = unreported,
    ) -> None:
        """`report` has what keeps points from being sent."""
        self.patience = patience
        self._log, self._report = log, report
        self._writer = RunWriter(store, run)
        self._queue = BackgroundQueue("tracking")
        self._points: list[Point] = []
        self._submitted = 0
        self._lock = threading.Lock()
        self._sent = time.monotonic()
        self._images_fail = False
        self._last_step: dict[str, int] = {}

    def resume(self) -> None:
        """Read how far each metric of the run goes, so that no step is logged twice. Raises JobError where the server stays away."""
        self._last_step = retry(
            self._writer.last_steps,
            description="reading the run's curves",
            timeout=self.patience,
            log=self._log,
            report=self._report,
            is_transient=is_outage,
        )

    @property
    def failure(self) -> JobError | None:
        """Why logging was given up; None while it works."""
        failure = self._queue.failure
        if failure is None or isinstance(failure, JobError):
            return failure
        return JobError(f"logging failed: {failure}")

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Buffer values of an optimizer step; those that the run has already are left out."""
        now = int(time.time() * 1000)
        self.restore((name, float(value), now, step) for name, value in values.items())

    def pending_points(self) -> list[Point]:
        """Points that the server may not have yet. A checkpoint keeps them, as they are lost with the process."""
        with self._lock:
            return list(self._points)

    def restore(self, points: Iterable[Point]) -> None:
        """Buffer the points that a checkpoint kept; those that the run has already are left out."""
        new = [point for point in points if point[3] > self._last_step.get(point[0], -1)]
        self._last_step.update({name: step for name, _, _, step in new})
        with self._lock:
            self._points += new

    def log_image(self, step: int, key: str, image: np.ndarray[Any, Any]) -> None:
        """Send a sample grid (H, W, 3) uint8, which the run's page shows with a step slider.

        One that cannot be sent is left out, and the log says so. While that is so, later ones are tried once each.
        """
        self._queue.submit(lambda: self._try_image(step, key, image))

    def add_flag(self, sentence: str) -> None:
        """Add a sentence on the run's numbers to its tag `eval.flags`, once."""
        self._queue.submit(lambda: self._with_retries(lambda: self._writer.add_flag(sentence)))

    def send(self, every: float = 0.0) -> None:
        """Send what is buffered, in the background, if the last time was `every` seconds ago."""
        if time.monotonic() - self._sent < every:
            return
        with self._lock:
            batch = self._points[self._submitted :]
            self._submitted = len(self._points)
        if batch:
            self._sent = time.monotonic()
            self._queue.submit(lambda: self._send(batch))

    def flush(self) -> None:
        """Send what is buffered and wait until the server has it. Raises JobError where logging was given up."""
        self.send()
        self._queue.drain()
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Flush, and end the background thread. Raises JobError where logging was given up."""
        try:
            self.flush()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """End the background thread, without retries."""
        self._queue.abandon()

    def _send(self, batch: list[Point]) -> None:
        self._with_retries(lambda: self._writer.write_metrics(batch))
        with self._lock:
            del self._points[: len(batch)]
            self._submitted -= len(batch)

    def _try_image(self, step: int, key: str, image: np.ndarray[Any, Any]) -> None:
        description = f"sending {key} of step {step} to {self._writer.store.uri}"
        try:
            retry(
                lambda: self._writer.write_image(step, key, image),
                description=description,
                timeout=0.0 if self._images_fail else self.patience,
                log=self._log,
                is_transient=is_outage,
                cancel=self._queue.cancelled,
            )
            self._images_fail = False
        except Exception as error:
            # A grid that cannot be sent, whatever the reason, does not fail the trial.
            self._images_fail = True
            reason = (
                str(error) if isinstance(error, JobError) else f"{description} failed: {summarize(error)}"
            )
            self._log(f"{reason}; it is left out")

    def _with_retries(self, action: Callable[[], None]) -> None:
        retry(
            action,
            description=f"logging to {self._writer.store.uri}",
            timeout=self.patience,
            log=self._log,
            report=self._report,
            is_transient=is_outage,
            cancel=self._queue.cancelled,
        )
