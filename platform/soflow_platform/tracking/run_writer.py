"""Writes metrics, images and flags to one MLflow run; a write that failed can be repeated without duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_platform.tracking.page_texts import show_grids
from soflow_platform.tracking.store import FLAGS_TAG, TrackingStore

if TYPE_CHECKING:
    import numpy as np

Point = tuple[str, float, int, int]
"""Metric name, value, milliseconds since 1970, optimizer step."""
POINTS_PER_BATCH = 1000
"""Largest number of points in one request, a limit of MLflow."""
FLAGS_LENGTH = 4000
"""Largest number of characters in the tag of flags; a flag that does not fit is in the trial's log alone."""


class RunWriter:
    """Metrics, images and flags of one run. Each method raises what MLflow raises and may be called again with the same arguments."""

    def __init__(self, store: TrackingStore, run: str) -> None:
        self.store, self.run = store, run
        self._uncertain = False
        """Whether the last request with metrics failed. The server may still have stored its points."""

    def last_steps(self) -> dict[str, int]:
        """The last step of each metric of the run."""
        client = self.store.client
        latest = client.get_run(self.run).data.metrics
        return {name: max(m.step for m in client.get_metric_history(self.run, name)) for name in latest}

    def write_metrics(self, points: Sequence[Point]) -> None:
        """Append points whose steps ascend for each metric."""
        from mlflow.entities import Metric

        if self._uncertain:
            last = self.last_steps()
            points = [point for point in points if point[3] > last.get(point[0], -1)]
        self._uncertain = True
        for start in range(0, len(points), POINTS_PER_BATCH):
            metrics = [Metric(*point) for point in points[start : start + POINTS_PER_BATCH]]
            self.store.client.log_batch(self.run, metrics=metrics)
        self._uncertain = False

    def write_image(self, step: int, key: str, image: np.ndarray[Any, Any]) -> None:
        """Add an image (H, W, 3) uint8 to the series `key`, and to the run's description."""
        client = self.store.client
        # MLflow names the file "samples~nfe1+step+200+timestamp+...".
        marker = f"{key.replace('/', '~')}+step+{step}+"
        if not any(marker in Path(item.path).name for item in client.list_artifacts(self.run, "images")):
            client.log_image(self.run, image, key=key, step=step, synchronous=True)
        show_grids(client, self.run)

    def add_flag(self, sentence: str) -> None:
        """Append a sentence to the tag `eval.flags`."""
        client = self.store.client
        flags = client.get_run(self.run).data.tags.get(FLAGS_TAG, "")
        extended = f"{flags} {sentence}".strip()
        if sentence not in flags and len(extended) <= FLAGS_LENGTH:
            client.set_tag(self.run, FLAGS_TAG, extended)
