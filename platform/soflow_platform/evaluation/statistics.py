"""Statistics of a set of images, gathered in blocks that are each complete or absent.

A measurement is a set of images, a feature network and the metrics wanted; its key is a digest of all that decides its numbers. Its
folder holds one file for each block that is done and, at the end, the whole in place of the blocks. Blocks are merged in order, so
that the result is the same whoever made them and however often it was cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from soflow_pipelines.features import FeatureNetwork
from soflow_pipelines.metrics import EVALUATOR, ScoreStatistics
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.evaluation.image_sources import (
    GeneratedImages,
    OpenedGenerator,
    OpenedStoredImages,
    OpenedTrainingSamples,
    StoredImages,
)
from soflow_platform.generation.generator import BATCH

BLOCKS = 16
"""A small set is cut into about as many blocks."""
LARGEST_BLOCK = 1024
MERGED = "statistics.npz"


@dataclass(frozen=True)
class StatisticsJob:
    """What is gathered of which images. Plain data, so that it travels to any node."""

    images: GeneratedImages | StoredImages
    features: str
    """Name of the feature network."""
    features_id: str
    metrics: tuple[str, ...]
    shape: tuple[int, int, int] = (0, 0, 0)
    """(C, H, W) of samples in the training space, for features that look at it."""

    @property
    def key(self) -> str:
        """The same for the same statistics."""
        facts = {
            "evaluator": EVALUATOR,
            "images": self.images.facts(),
            "features": self.features_id,
            "metrics": self.metrics,
            "block": self.block,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def block(self) -> int:
        """Images in one block: whole batches, so that no batch depends on the cut."""
        wanted = min(LARGEST_BLOCK, -(-self.images.count // BLOCKS))
        return max(1, -(-wanted // BATCH)) * BATCH

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.images.count // self.block)

    def size(self, block: int) -> int:
        """Images in this one."""
        return min(self.block, self.images.count - block * self.block)


@dataclass(frozen=True)
class BlockStore:
    """Where the blocks of one measurement are kept."""

    folder: Path
    measurement: StatisticsJob

    @classmethod
    def of(cls, measurement: StatisticsJob, root: Path) -> BlockStore:
        """Its folder below `root`; nothing is created."""
        return cls(root / measurement.key, measurement)

    def missing(self) -> list[int]:
        """Blocks that are still to be made."""
        if (self.folder / MERGED).exists():
            return []
        return [block for block in range(self.measurement.blocks) if not self._path(block).exists()]

    def publish(self, block: int, statistics: ScoreStatistics) -> None:
        """Keep a block, complete or absent."""
        _save(self._path(block), statistics)

    def whole(self) -> ScoreStatistics:
        """The statistics of all blocks, merged in order; they are kept in place of the blocks."""
        path = self.folder / MERGED
        if not path.exists():
            try:
                _save(path, self._merged())
            except FileNotFoundError:
                # Another command may have merged the blocks and removed them meanwhile.
                if not path.exists():
                    raise
        for block in range(self.measurement.blocks):
            self._path(block).unlink(missing_ok=True)
        return _load(path)

    def _merged(self) -> ScoreStatistics:
        whole = _load(self._path(0))
        for block in range(1, self.measurement.blocks):
            whole.merge(_load(self._path(block)))
        return whole

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.npz"


def compute_block(
    measurement: StatisticsJob,
    block: int,
    opened: OpenedGenerator | OpenedStoredImages | OpenedTrainingSamples,
    network: FeatureNetwork,
    count: Callable[[int], None] | None = None,
) -> ScoreStatistics:
    """The statistics of one block. ScoreError where a sample is refused; `count` hears of every batch."""
    statistics = ScoreStatistics(network, measurement.metrics, samples=measurement.images.count)
    first = block * measurement.block
    last = first + measurement.size(block)
    for start in range(first, last, BATCH):
        stop = min(start + BATCH, last)
        images, labels = opened.read(start, stop)
        statistics.update(torch.arange(start, stop), images, labels)
        if count is not None:
            count(stop - start)
    return statistics


def compute_statistics(
    measurement: StatisticsJob, network: FeatureNetwork, device: str | torch.device
) -> ScoreStatistics:
    """The statistics of all blocks, made in this process and merged in order; nothing is kept."""
    opened = measurement.images.open(device)
    with (
        contextlib.closing(opened) if isinstance(opened, OpenedTrainingSamples) else contextlib.nullcontext()
    ):
        whole = compute_block(measurement, 0, opened, network)
        for block in range(1, measurement.blocks):
            whole.merge(compute_block(measurement, block, opened, network))
        return whole


def _save(path: Path, statistics: ScoreStatistics) -> None:
    content = io.BytesIO()
    np.savez(content, **statistics.state())  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def _load(path: Path) -> ScoreStatistics:
    with np.load(path) as arrays:
        return ScoreStatistics.from_state(dict(arrays))
