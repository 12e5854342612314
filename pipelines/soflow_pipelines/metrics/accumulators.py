"""Accumulators: streaming statistics of a set of images that merge over workers; each serves one or more metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from soflow_core.failures import InputError
from soflow_pipelines.features.network import Features
from soflow_pipelines.metrics.fid import FeatureStatistics
from soflow_pipelines.metrics.inception_score import InceptionScoreSums
from soflow_pipelines.metrics.label_agreement import count_label_matches
from soflow_pipelines.metrics.reservoir import Reservoir

if TYPE_CHECKING:
    from typing_extensions import Self


class ScoreError(InputError, ValueError):
    """A score that is refused because it would mislead. The text says why, and what to do."""


@dataclass(frozen=True)
class AccumulatorSettings:
    """Sizes that accumulators are made with."""

    dim: int
    """Width D of the features."""
    samples: int | None
    """Number of images planned, numbered from 0; None where it is not known."""
    capacity: int
    """Samples whose features a reservoir keeps, at most."""


class Accumulator(ABC):
    """Statistics of a set of images, accumulated batch by batch.

    `update` and `merge` in any order, over any split of the images, give the same statistics (sums to rounding).
    """

    name: ClassVar[str]
    """Prefix of its arrays in a state."""

    @abstractmethod
    def __init__(self, settings: AccumulatorSettings) -> None: ...

    @abstractmethod
    def update(self, indices: NDArray[np.int64], features: Features, labels: Tensor | None) -> None:
        """Add a batch: numbers (B,) of the images, output of the feature network, labels (B,) that they were generated for."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the statistics of another worker."""

    @abstractmethod
    def state(self) -> dict[str, NDArray]:
        """Arrays by name; none while no image was taken in, where sizes are not known before."""

    @abstractmethod
    def load(self, state: Mapping[str, NDArray]) -> None:
        """Restore the statistics from their `state`."""


class Moments(Accumulator):
    """Mean and covariance of the features, for Fréchet distances."""

    name = "moments"

    def __init__(self, settings: AccumulatorSettings) -> None:
        self.statistics = FeatureStatistics(settings.dim)

    def update(self, indices: NDArray[np.int64], features: Features, labels: Tensor | None) -> None:
        del indices, labels
        self.statistics.update(features.features)

    def merge(self, other: Self) -> None:
        self.statistics.merge(other.statistics)

    def state(self) -> dict[str, NDArray]:
        return self.statistics.state()

    def load(self, state: Mapping[str, NDArray]) -> None:
        self.statistics = FeatureStatistics.from_state(state)


class SpatialMoments(Accumulator):
    """Mean and covariance of the spatial features, for sFID; their width is that of the first batch."""

    name = "spatial"

    def __init__(self, settings: AccumulatorSettings) -> None:
        del settings
        self.statistics: FeatureStatistics | None = None

    def update(self, indices: NDArray[np.int64], features: Features, labels: Tensor | None) -> None:
        del indices, labels
        if features.spatial is None:
            raise ValueError("the feature network has no spatial features")
        self.statistics = self.statistics or FeatureStatistics(features.spatial.shape[1])
        self.statistics.update(features.spatial)

    def merge(self, other: Self) -> None:
        if other.statistics is not None:
            self.statistics = self.statistics or FeatureStatistics(other.statistics.dim)
            self.statistics.merge(other.statistics)

    def state(self) -> dict[str, NDArray]:
        return {} if self.statistics is None else self.statistics.state()

    def load(self, state: Mapping[str, NDArray]) -> None:
        self.statistics = FeatureStatistics.from_state(state) if state else None


class ClassSums(Accumulator):
    """Sums over the class probabilities, for the Inception Score; the number of classes is that of the first batch."""

    name = "classes"

    def __init__(self, settings: AccumulatorSettings) -> None:
        if settings.samples is None:
            raise ValueError(
                "the Inception Score needs the number of samples, for its splits are made by index"
            )
        self._samples = settings.samples
        self.sums: InceptionScoreSums | None = None

    def update(self, indices: NDArray[np.int64], features: Features, labels: Tensor | None) -> None:
        del labels
        if features.logits is None:
            raise ValueError("the feature network has no logits")
        self.sums = self.sums or InceptionScoreSums(features.logits.shape[1], self._samples)
        self.sums.update(indices, features.logits)

    def merge(self, other: Self) -> None:
        if other.sums is not None:
            self.sums = self.sums or InceptionScoreSums(other.sums.classes, other.sums.samples)
            self.sums.merge(other.sums)

    def state(self) -> dict[str, NDArray]:
        return {} if self.sums is None else self.sums.state()

    def load(self, state: Mapping[str, NDArray]) -> None:
        self.sums = InceptionScoreSums.from_state(state) if state else None


class FeatureReservoir(Accumulator):
    """Features of a bounded number of samples, for KID, precision and recall."""

    name = "reservoir"

    def __init__(self, settings: AccumulatorSettings) -> None:
        self.reservoir = Reservoir(settings.dim, settings.capacity)

    def update(self, indices: NDArray[np.int64], features: Features, labels: Tensor | None) -> None:
        del labels
        self.reservoir.update(indices, features.features.detach().cpu().numpy())

    def merge(self, other: Self) -> None:
        self.reservoir.merge(other.reservoir)

    def state(self) -> dict[str, NDArray]:
        return self.reservoir.state()

    def load(self, state: Mapping[str, NDArray]) -> None:
        self.reservoir = Reservoir.from_state(state)


class LabelAgreement(Accumulator):
    """Number of images for which a classifier predicts the label that they were generated for."""

    name = "labels"

    def __init__(self, settings: AccumulatorSettings) -> None:
        del settings
        self.matches = 0

    def update(self, indices: NDArray[np.int64], features: Features, labels: Tensor | None) -> None:
        del indices
        if features.logits is None:
            raise ValueError("the feature network has no logits")
        if labels is None:
            raise ScoreError("label agreement is of samples that were asked for by label; these have none.")
        self.matches += count_label_matches(features.logits, labels)

    def merge(self, other: Self) -> None:
        self.matches += other.matches

    def state(self) -> dict[str, NDArray]:
        return {"matches": np.asarray(self.matches)}

    def load(self, state: Mapping[str, NDArray]) -> None:
        self.matches = int(state["matches"])
