"""Streaming statistics of a set of images, from which its scores are taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.features.network import FeatureNetwork, Features
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.metrics.accumulators import (
    Accumulator,
    AccumulatorSettings,
    LabelAgreement,
    ScoreError,
)
from soflow_pipelines.metrics.registry import accumulators_of, select_metrics
from soflow_pipelines.metrics.reservoir import splitmix64

RESERVOIR = 50_000
"""Samples whose features are kept for KID, precision and recall, at most."""

AccumulatorT = TypeVar("AccumulatorT", bound=Accumulator)


class ScoreStatistics:
    """Statistics of a set of images, of a size that does not grow with the number of images.

    Every image has an index. Statistics of parts, taken by several workers, merge to those that one worker would have taken of all
    images: sums to rounding, and the reservoir exactly. `samples` is the number of images planned, numbered from 0; scores are then
    refused while one is missing or counted twice. The Inception Score needs it, for its splits are made by index.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        metrics: Iterable[str],
        samples: int | None = None,
        reservoir: int = RESERVOIR,
    ) -> None:
        self._network = network
        self.metrics = select_metrics(metrics, network)
        self.features, self.dim, self.warnings = network.id, network.dim, network.warnings
        self.samples, self.capacity = samples, reservoir
        self.count = 0
        self.resolution: tuple[int, int] | None = None
        self._checksum = 0
        settings = AccumulatorSettings(self.dim, samples, reservoir)
        self.parts: dict[str, Accumulator] = {
            kind.name: kind(settings) for kind in accumulators_of(self.metrics)
        }

    def part(self, kind: type[AccumulatorT]) -> AccumulatorT | None:
        """The accumulator of this kind; None where no metric needs it."""
        part = self.parts.get(kind.name)
        return part if isinstance(part, kind) else None

    def update(self, indices: Tensor, images: Tensor, labels: Tensor | None = None) -> None:
        """Take in images (B, C, H, W) with their indices (B,) and, for label agreement, the labels (B,) that they were generated for.

        Images are uint8, or float in [-1, 1] and then become uint8 by the official rule; a network that looks at the training space
        takes samples as they are. Raises ScoreError where a value is not finite or the sizes of images differ.
        """
        numbers = indices.detach().cpu().numpy().astype(np.int64)
        if images.ndim != 4 or numbers.shape != (len(images),):
            raise ValueError(f"{tuple(numbers.shape)} indices do not fit images {tuple(images.shape)}")
        if not len(images):
            return
        resolution = (int(images.shape[2]), int(images.shape[3]))
        if self.resolution not in (None, resolution):
            raise ScoreError(
                f"sample {numbers[0]} is {format_size(resolution)}, those before it are {format_size(self.resolution)}: one score is "
                "images of one size."
            )
        features = self._network(_checked(images, numbers, self._network.space))
        for part in self.parts.values():
            part.update(numbers, features, labels)
        self.resolution = resolution
        self.count += len(numbers)
        self._checksum = (self._checksum + _checksum(numbers)) % 2**64

    def merge(self, other: ScoreStatistics) -> None:
        """Take in the statistics of another worker. Raises ScoreError where they are of something else."""
        for name in ("features", "metrics", "samples", "capacity"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ScoreError(f"statistics with {name} {theirs} cannot join those with {name} {mine}.")
        if other.resolution is not None:
            if self.resolution not in (None, other.resolution):
                raise ScoreError(
                    f"statistics of images {format_size(other.resolution)} cannot join those of images {format_size(self.resolution)}."
                )
            self.resolution = other.resolution
        self.count += other.count
        self._checksum = (self._checksum + other._checksum) % 2**64
        for name, part in self.parts.items():
            part.merge(other.parts[name])

    def check_complete(self) -> None:
        """Raises ScoreError unless each of the planned samples was counted once."""
        if self.samples is None:
            return
        if self.count != self.samples:
            raise ScoreError(
                f"{self.count} of {self.samples} samples were counted: make the missing ones first."
            )
        if self._checksum != _checksum(np.arange(self.samples)):
            raise ScoreError(
                f"the {self.samples} samples counted are not those numbered from 0 to {self.samples - 1}: "
                "one was counted twice."
            )

    def state(self) -> dict[str, NDArray]:
        """Plain arrays to keep in an .npz file."""
        agreement = self.part(LabelAgreement)
        state: dict[str, NDArray] = {
            "features": np.asarray(self.features),
            "warnings": np.asarray(self.warnings, dtype=np.str_),
            "metrics": np.asarray(self.metrics, dtype=np.str_),
            "dim": np.asarray(self.dim),
            "samples": np.asarray(-1 if self.samples is None else self.samples),
            "capacity": np.asarray(self.capacity),
            "count": np.asarray(self.count),
            "checksum": np.asarray(self._checksum, dtype=np.uint64),
            "resolution": np.asarray(self.resolution or (0, 0)),
            # The file format has this number without a prefix, and always.
            "agreed": np.asarray(0 if agreement is None else agreement.matches),
        }
        for name, part in self.parts.items():
            if part is not agreement:
                state |= {f"{name}.{key}": value for key, value in part.state().items()}
        return state

    @classmethod
    def from_state(
        cls, state: Mapping[str, NDArray], network: FeatureNetwork | None = None
    ) -> ScoreStatistics:
        """The statistics with this state: with their `network` they take more images, without it they merge and are scored."""
        features = str(state["features"])
        if network is not None and network.id != features:
            raise ScoreError(f"the statistics are of {features}, the network is {network.id}.")
        metrics = tuple(str(metric) for metric in state["metrics"])
        warnings = tuple(str(warning) for warning in state["warnings"])
        samples, capacity = int(state["samples"]), int(state["capacity"])
        statistics = cls(
            network or _AbsentNetwork(features, int(state["dim"]), frozenset(metrics), warnings),
            metrics,
            None if samples < 0 else samples,
            capacity,
        )
        statistics.warnings = warnings
        statistics.count, statistics._checksum = int(state["count"]), int(state["checksum"])
        height, width = (int(side) for side in state["resolution"])
        statistics.resolution = (height, width) if height else None
        for name, part in statistics.parts.items():
            if isinstance(part, LabelAgreement):
                part.load({"matches": state["agreed"]})
            else:
                part.load(_with_prefix(state, f"{name}."))
        return statistics


@dataclass
class _AbsentNetwork:
    """Placeholder for the feature network of statistics that were read back without it."""

    id: str
    dim: int
    metrics: frozenset[str]
    warnings: tuple[str, ...]
    space: Literal["images", "training"] = "training"

    def __call__(self, images: Tensor) -> Features:
        del images
        raise ValueError("statistics that were read back take no images unless they are given their network")


def _with_prefix(state: Mapping[str, NDArray], prefix: str) -> dict[str, NDArray]:
    return {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}


def _checked(images: Tensor, indices: NDArray[np.int64], space: Literal["images", "training"]) -> Tensor:
    if not images.dtype.is_floating_point:
        return images
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        first = int(torch.nonzero(~finite)[0])
        raise ScoreError(
            f"sample {indices[first]} has values that are not finite, as {int((~finite).sum())} of {len(images)} in its batch: "
            "the network or its decoder diverged, and no score is taken."
        )
    return to_uint8(images) if space == "images" else images


def _checksum(indices: NDArray[np.int64]) -> int:
    """Checksum of a set of indices that does not depend on their order."""
    return int(splitmix64(indices).sum(dtype=np.uint64))


def format_size(resolution: tuple[int, int] | None) -> str:
    """A height and a width as text."""
    return "of no size" if resolution is None else f"{resolution[0]} x {resolution[1]}"
