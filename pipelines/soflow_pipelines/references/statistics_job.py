"""Statistics jobs: which statistics of which images are computed on which feature network, in blocks.

A job is plain data that travels to any node; its key is a digest of all that decides its numbers. Blocks are merged in order, so that
the result does not depend on who computed them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.metrics.score_statistics import ScoreStatistics
from soflow_pipelines.metrics.version import EVALUATOR

BATCH = 64
"""Images in one forward pass."""
BLOCKS = 16
"""A small set is cut into about as many blocks."""
LARGEST_BLOCK = 1024


class OpenedImages(Protocol):
    """Images that can be read by number."""

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images start to stop (B, C, H, W), at most BATCH of them from a multiple of BATCH on, and their labels (B,)."""

    def close(self) -> None:
        """Close files and stop threads."""


class ImageSource(Protocol):
    """Plain data that names a set of images."""

    @property
    def count(self) -> int:
        """Number of images."""

    def cache_key_fields(self) -> dict[str, Any]:
        """Everything that decides the images, as JSON values; their location is not part of it."""

    def open(self, device: str | torch.device) -> OpenedImages:
        """Open the set; networks that make or decode its images are on `device`."""


@dataclass(frozen=True)
class StatisticsJob:
    """Images, feature network and metrics of one computation."""

    images: ImageSource
    features: str
    """Name of the feature network."""
    features_id: str
    metrics: tuple[str, ...]
    shape: tuple[int, int, int] = (0, 0, 0)
    """(C, H, W) of samples in the training space, for features of that space."""

    @property
    def key(self) -> str:
        """Digest that is equal for equal statistics."""
        fields = {
            "evaluator": EVALUATOR,
            "images": self.images.cache_key_fields(),
            "features": self.features_id,
            "metrics": self.metrics,
            "block": self.block,
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def block(self) -> int:
        """Images in one block: whole batches, so that no batch depends on the cut."""
        size = min(LARGEST_BLOCK, -(-self.images.count // BLOCKS))
        return max(1, -(-size // BATCH)) * BATCH

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.images.count // self.block)

    def size(self, block: int) -> int:
        """Images in this block."""
        return min(self.block, self.images.count - block * self.block)


ComputeStatistics = Callable[[StatisticsJob], ScoreStatistics]
"""Computes the statistics of a job: in this process, or on a cluster."""


@dataclass(frozen=True)
class LocalStatistics:
    """Computes statistics in this process, on an open feature network."""

    features: FeatureNetwork
    device: str | torch.device = "cpu"

    def __call__(self, job: StatisticsJob) -> ScoreStatistics:
        """The statistics of all blocks, merged in order; nothing is kept."""
        return compute_statistics(job, self.features, self.device)


def compute_block(
    job: StatisticsJob,
    block: int,
    images: OpenedImages,
    features: FeatureNetwork,
    on_batch: Callable[[int], None] | None = None,
) -> ScoreStatistics:
    """The statistics of one block; `on_batch` is called with the size of every batch. Raises ScoreError for a refused sample."""
    statistics = ScoreStatistics(features, job.metrics, samples=job.images.count)
    first = block * job.block
    last = first + job.size(block)
    for start in range(first, last, BATCH):
        stop = min(start + BATCH, last)
        batch, labels = images.read(start, stop)
        statistics.update(torch.arange(start, stop), batch, labels)
        if on_batch is not None:
            on_batch(stop - start)
    return statistics


def compute_statistics(
    job: StatisticsJob, features: FeatureNetwork, device: str | torch.device
) -> ScoreStatistics:
    """The statistics of all blocks, computed in this process and merged in order; nothing is kept."""
    with contextlib.closing(job.images.open(device)) as images:
        whole = compute_block(job, 0, images, features)
        for block in range(1, job.blocks):
            whole.merge(compute_block(job, block, images, features))
        return whole
