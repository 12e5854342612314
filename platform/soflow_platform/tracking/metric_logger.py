"""The growing record of one run: curves and sample grids, sent in the background.

A step is logged once: a run that is resumed skips what its earlier life had logged. A tracking server that is away for a while
delays the record and not the training.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_core.failures import summarize
from soflow_platform.errors import JobError
from soflow_platform.storage.retry import retry
from soflow_platform.tracking.outages import is_outage
from soflow_platform.tracking.store import FLAGS_TAG, client_for

if TYPE_CHECKING:
    import numpy as np

Point = tuple[str, float, int, int]
"""Key, value, milliseconds since 1970, optimizer step."""
POINTS_PER_BATCH = 1000
"""Points in one message, the most MLflow takes."""
PATIENCE_SECONDS = 600.0
"""How long a tracking server may be away before its record is given up and the trial fails."""
FLAGS_LENGTH = 4000
"""Characters of a run's flags that a tag holds; those beyond are in the trial's log alone."""


class MetricLogger:
    """Metrics are gathered by `metrics`, sent in order by `send`, and known to be there after `flush`."""

    def __init__(
        self, uri: str, run: str, say: Callable[[str], None], patience: float = PATIENCE_SECONDS
    ) -> None:
        self.uri, self.run, self.say, self.patience = uri, run, say, patience
        self._last_step = self._ends()
        self._pending: list[Any] = []
        self._unsent: list[Any] = []
        self._sent = time.monotonic()
        self._tasks: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._failure: JobError | None = None
        self._grids_lost = False
        self._closing = threading.Event()

    @classmethod
    def resume(
        cls, uri: str, run: str, say: Callable[[str], None], patience: float = PATIENCE_SECONDS
    ) -> MetricLogger:
        """Open a run's record, noting how far each of its curves goes. Raises JobError where the server stays away."""
        return retry(
            lambda: cls(uri, run, say, patience), "reading the run's curves", patience, say, is_outage
        )

    @property
    def failure(self) -> JobError | None:
        """Why the record was given up; None while it is kept."""
        return self._failure

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Note values at an optimizer step; those that the run already has are left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._note([Metric(key, float(value), now, step) for key, value in values.items()])

    def unsent(self) -> list[Point]:
        """The points that the server may not have yet: a checkpoint keeps them, for a process that ends takes them with it."""
        with self._lock:
            return [(m.key, m.value, m.timestamp, m.step) for m in self._unsent]

    def restore(self, points: list[Point]) -> None:
        """Note again what a checkpoint kept; what the server has is left out."""
        from mlflow.entities import Metric

        self._note([Metric(*point) for point in points])

    def _note(self, points: list[Any]) -> None:
        new = [m for m in points if m.step > self._last_step.get(m.key, -1)]
        self._last_step.update({m.key: m.step for m in new})
        with self._lock:
            self._pending += new
            self._unsent += new

    def grid(self, step: int, key: str, image: np.ndarray[Any, Any]) -> None:
        """A sample grid (H, W, 3) uint8, with a step slider on the run's page; once for each step.

        One that cannot be sent is told and left out. While that is so, later ones are tried once each.
        """
        self._later(lambda: self._try_grid(step, key, image))

    def flag(self, sentence: str) -> None:
        """Add what has to be said of the run's numbers to its tag `eval.flags`; once."""
        self._later(lambda: self._send_flag(sentence))

    def send(self, every: float = 0.0) -> None:
        """Send what was noted, in the background, if the last sending was `every` seconds ago."""
        if self._pending and time.monotonic() - self._sent >= every:
            self._sent = time.monotonic()
            with self._lock:
                batch, self._pending = self._pending, []
            tried = threading.Event()
            self._later(lambda: self._send_metrics(batch, tried))

    def flush(self) -> None:
        """Send what was noted and wait until it is there. Raises JobError where it was given up."""
        self.send()
        while (thread := self._thread) is not None:
            thread.join()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Let what is being sent come to its end, without trying again what fails."""
        self._closing.set()
        while (thread := self._thread) is not None:
            thread.join()

    def _later(self, task: Callable[[], None]) -> None:
        with self._lock:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._tasks or self._failure is not None:
                    self._thread = None
                    return
                task = self._tasks.popleft()
            try:
                retry(task, f"logging to {self.uri}", self.patience, self.say, is_outage, self._closing)
            except Exception as error:
                # Raised by `flush` or where the ranks next agree; a thread of its own has nobody to tell.
                self._failure = error if isinstance(error, JobError) else JobError(f"logging failed: {error}")

    def _send_metrics(self, batch: list[Any], tried: threading.Event) -> None:
        count = len(batch)
        if tried.is_set():
            # The server may have taken it before the connection broke.
            ends = self._ends()
            batch = [m for m in batch if m.step > ends.get(m.key, -1)]
        tried.set()
        for start in range(0, len(batch), POINTS_PER_BATCH):
            client_for(self.uri).log_batch(self.run, metrics=batch[start : start + POINTS_PER_BATCH])
        with self._lock:
            # What was noted is sent in order.
            del self._unsent[:count]

    def _try_grid(self, step: int, key: str, image: np.ndarray[Any, Any]) -> None:
        what = f"sending {key} of step {step} to {self.uri}"
        patience = 0.0 if self._grids_lost else self.patience
        try:
            retry(
                lambda: self._send_grid(step, key, image), what, patience, self.say, is_outage, self._closing
            )
            self._grids_lost = False
        except Exception as error:
            # A picture is not worth a trial, whatever the reason.
            self._grids_lost = True
            said = str(error) if isinstance(error, JobError) else f"{what} failed: {summarize(error)}"
            self.say(f"{said}; it is left out")

    def _send_grid(self, step: int, key: str, image: np.ndarray[Any, Any]) -> None:
        client = client_for(self.uri)
        # MLflow names the file "samples~nfe1+step+200+timestamp+...".
        marker = f"{key.replace('/', '~')}+step+{step}+"
        if not any(marker in Path(item.path).name for item in client.list_artifacts(self.run, "images")):
            client.log_image(self.run, image, key=key, step=step, synchronous=True)

    def _send_flag(self, sentence: str) -> None:
        client = client_for(self.uri)
        said = client.get_run(self.run).data.tags.get(FLAGS_TAG, "")
        together = f"{said} {sentence}".strip()
        if sentence not in said and len(together) <= FLAGS_LENGTH:
            client.set_tag(self.run, FLAGS_TAG, together)

    def _ends(self) -> dict[str, int]:
        """The last step of each curve that the run has."""
        client = client_for(self.uri)
        latest = client.get_run(self.run).data.metrics
        return {key: max(m.step for m in client.get_metric_history(self.run, key)) for key in latest}
