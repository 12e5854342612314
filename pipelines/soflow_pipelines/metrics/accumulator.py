"""What is gathered of a set of images, by batch and by worker, so that its scores can be taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_core.failures import InputError
from soflow_pipelines.features.network import FeatureNetwork, Features
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.metrics.fid import FeatureStatistics
from soflow_pipelines.metrics.inception_score import InceptionScoreSums
from soflow_pipelines.metrics.label_agreement import count_label_matches
from soflow_pipelines.metrics.reservoir import Reservoir, splitmix64

RESERVOIR = 50_000
"""Samples whose features are kept for KID, precision and recall, at most."""


class ScoreError(InputError, ValueError):
    """A number that is refused because it would not be what it seems. The text says why, and what to do."""


@dataclass(frozen=True)
class Metric:
    """What a score needs, and which way is better."""

    better: Literal["min", "max"]
    compares: bool
    """Against a reference."""
    gathers: Literal["moments", "spatial", "classes", "labels", "reservoir"]


METRICS: dict[str, Metric] = {
    "fid": Metric("min", True, "moments"),
    "fd": Metric("min", True, "moments"),
    "sfid": Metric("min", True, "spatial"),
    "is": Metric("max", False, "classes"),
    "kid": Metric("min", True, "reservoir"),
    "precision": Metric("max", True, "reservoir"),
    "recall": Metric("max", True, "reservoir"),
    "label_agreement": Metric("max", False, "labels"),
}


class ScoreStatistics:
    """Statistics of images, as many as there may be: what they take does not grow with the number of images.

    Every image has an index. Parts gathered by workers merge to what one worker seeing all would have gathered: sums to rounding,
    and the reservoir exactly. `samples` is the number of images planned, numbered from 0; scores are then refused while one is
    missing or counted twice. The Inception Score needs it, for its splits are made by index.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        metrics: Iterable[str],
        samples: int | None = None,
        reservoir: int = RESERVOIR,
    ) -> None:
        self._network: FeatureNetwork | None = network
        self.metrics = chosen_metrics(metrics, network)
        self.features, self.dim, self.warnings = network.id, network.dim, network.warnings
        if "is" in self.metrics and samples is None:
            raise ValueError(
                "the Inception Score needs the number of samples, for its splits are made by index"
            )
        self.samples, self.capacity = samples, reservoir
        self._begin()

    def _begin(self) -> None:
        gathers = {METRICS[name].gathers for name in self.metrics}
        self.count = 0
        self.resolution: tuple[int, int] | None = None
        self._checksum = 0
        self.agreed = 0
        self.moments = FeatureStatistics(self.dim) if "moments" in gathers else None
        self.reservoir = Reservoir(self.dim, self.capacity) if "reservoir" in gathers else None
        # Their widths are known when the first batch has come.
        self.spatial: FeatureStatistics | None = None
        self.classes: InceptionScoreSums | None = None

    def update(self, indices: Tensor, images: Tensor, labels: Tensor | None = None) -> None:
        """Adds images (B, C, H, W) with their indices (B,) and, for label agreement, the labels (B,) asked for.

        Images are uint8, or float in [-1, 1] and then become uint8 by the official rule; a network that looks at the training space
        takes samples as they are. ScoreError where a value is not finite or the sizes of images differ.
        """
        if self._network is None:
            raise ValueError(
                "statistics that were read back take no images unless they are given their network"
            )
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
        seen = self._network(_checked(images, numbers, self._network.space))
        self._gather(numbers, seen, labels)
        self.resolution = resolution
        self.count += len(numbers)
        self._checksum = (self._checksum + _checksum(numbers)) % 2**64

    def _gather(self, indices: NDArray[np.int64], seen: Features, labels: Tensor | None) -> None:
        if self.moments is not None:
            self.moments.update(seen.features)
        if self.reservoir is not None:
            self.reservoir.update(indices, seen.features.detach().cpu().numpy())
        if "sfid" in self.metrics:
            assert seen.spatial is not None, f"{self.features} promises sfid"
            self.spatial = self.spatial or FeatureStatistics(seen.spatial.shape[1])
            self.spatial.update(seen.spatial)
        if "is" in self.metrics:
            assert seen.logits is not None, f"{self.features} promises is"
            assert self.samples is not None
            self.classes = self.classes or InceptionScoreSums(seen.logits.shape[1], self.samples)
            self.classes.update(indices, seen.logits)
        if "label_agreement" in self.metrics:
            assert seen.logits is not None, f"{self.features} promises label_agreement"
            if labels is None:
                raise ScoreError(
                    "label agreement is of samples that were asked for by label; these have none."
                )
            self.agreed += count_label_matches(seen.logits, labels)

    def merge(self, other: ScoreStatistics) -> None:
        """Adds what another worker gathered. ScoreError where it gathered something else."""
        for what in ("features", "metrics", "samples", "capacity"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ScoreError(f"statistics with {what} {theirs} cannot join those with {what} {mine}.")
        if other.resolution is not None:
            if self.resolution not in (None, other.resolution):
                raise ScoreError(
                    f"statistics of images {format_size(other.resolution)} cannot join those of images {format_size(self.resolution)}."
                )
            self.resolution = other.resolution
        self.count += other.count
        self._checksum = (self._checksum + other._checksum) % 2**64
        self.agreed += other.agreed
        if self.moments is not None and other.moments is not None:
            self.moments.merge(other.moments)
        if self.reservoir is not None and other.reservoir is not None:
            self.reservoir.merge(other.reservoir)
        if other.spatial is not None:
            self.spatial = self.spatial or FeatureStatistics(other.spatial.dim)
            self.spatial.merge(other.spatial)
        if other.classes is not None:
            self.classes = self.classes or InceptionScoreSums(other.classes.classes, other.classes.samples)
            self.classes.merge(other.classes)

    def check_complete(self) -> None:
        """ScoreError unless each of the planned samples was counted once."""
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
            "agreed": np.asarray(self.agreed),
        }
        for name in ("moments", "spatial", "classes", "reservoir"):
            part = getattr(self, name)
            if part is not None:
                state |= {f"{name}.{key}": value for key, value in part.state().items()}
        return state

    @classmethod
    def from_state(
        cls, state: Mapping[str, NDArray], network: FeatureNetwork | None = None
    ) -> ScoreStatistics:
        """With its `network` it takes more images; without, it merges and is scored."""
        statistics = cls.__new__(cls)
        statistics._network = network
        statistics.features, statistics.dim = str(state["features"]), int(state["dim"])
        if network is not None and network.id != statistics.features:
            raise ScoreError(f"the statistics are of {statistics.features}, the network is {network.id}.")
        statistics.warnings = tuple(str(warning) for warning in state["warnings"])
        statistics.metrics = tuple(str(metric) for metric in state["metrics"])
        samples = int(state["samples"])
        statistics.samples = None if samples < 0 else samples
        statistics.capacity = int(state["capacity"])
        statistics._begin()
        statistics.count, statistics.agreed = int(state["count"]), int(state["agreed"])
        statistics._checksum = int(state["checksum"])
        height, width = (int(side) for side in state["resolution"])
        statistics.resolution = (height, width) if height else None
        if "moments.mean" in state:
            statistics.moments = FeatureStatistics.from_state(_part(state, "moments"))
        if "spatial.mean" in state:
            statistics.spatial = FeatureStatistics.from_state(_part(state, "spatial"))
        if "classes.counts" in state:
            statistics.classes = InceptionScoreSums.from_state(_part(state, "classes"))
        if "reservoir.indices" in state:
            statistics.reservoir = Reservoir.from_state(_part(state, "reservoir"))
        return statistics


def chosen_metrics(names: Iterable[str], network: FeatureNetwork) -> tuple[str, ...]:
    """The metrics of these names, in one order. ScoreError for a name that is none, or that the network cannot give."""
    wanted = set(names)
    unknown = sorted(wanted - set(METRICS))
    if unknown:
        raise ScoreError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}.")
    missing = sorted(wanted - network.metrics)
    if missing:
        able = ", ".join(name for name in METRICS if name in network.metrics)
        raise ScoreError(
            f"{missing[0]} cannot be measured on the features {network.id}; on them there are {able}."
        )
    if not wanted:
        raise ScoreError("there is no metric to measure.")
    return tuple(name for name in METRICS if name in wanted)


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
    """The same for the same set of indices in any order, and another for practically every other set."""
    return int(splitmix64(indices).sum(dtype=np.uint64))


def format_size(resolution: tuple[int, int] | None) -> str:
    """A height and a width in words."""
    return "of no size" if resolution is None else f"{resolution[0]} x {resolution[1]}"


def _part(state: Mapping[str, NDArray], name: str) -> dict[str, NDArray]:
    return {key.split(".", 1)[1]: state[key] for key in state if key.startswith(f"{name}.")}
