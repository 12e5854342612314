"""The metrics of the platform; their mathematics stands in the modules that they import.

Their order is that of a state file's arrays, and of tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from soflow_core.registration import register
from soflow_pipelines.metrics.accumulators import (
    Accumulator,
    ClassSums,
    FeatureReservoir,
    LabelAgreement,
    Moments,
    ScoreError,
    SpatialMoments,
)
from soflow_pipelines.metrics.fid import GaussianMoments, frechet_distance
from soflow_pipelines.metrics.inception_score import SPLITS
from soflow_pipelines.metrics.kid import SUBSET_SIZE, kernel_distance
from soflow_pipelines.metrics.precision_recall import NEIGHBOURS, precision_recall
from soflow_pipelines.metrics.registry import Metric, MetricValue, Sides


class FrechetMetric(Metric):
    """Fréchet distance of two sets of features."""

    better = "min"
    accumulator: ClassVar[type[Accumulator]] = Moments

    def score(self, sides: Sides) -> MetricValue:
        assert isinstance(sides.generated, Moments)
        return self._frechet(sides.generated.statistics.moments(), sides.reference.moments, sides.reference)

    def _frechet(
        self, generated: GaussianMoments, real: GaussianMoments | None, reference: Any
    ) -> MetricValue:
        name = self.name
        if real is None:
            raise ScoreError(f"the reference {reference.name} lacks the statistics that {name} needs.")
        if real.dim != generated.dim:
            raise ScoreError(
                f"the reference {reference.name} has {real.dim} features for {name}, the samples {generated.dim}."
            )
        sides = ("the samples", generated.count), (f"the reference {reference.name}", real.count)
        flags = tuple(
            f"{name} of {count} images in {generated.dim} features: fewer images than features in {whose}, so the "
            "covariance is singular and the number is not comparable."
            for whose, count in sides
            if count is not None and count < generated.dim
        )
        return MetricValue(frechet_distance(generated, real), flags=flags)


@register("fid")
@dataclass(frozen=True)
class FrechetInceptionDistance(FrechetMetric):
    """Fréchet distance on the published Inception network's features (FID)."""


@register("fd")
@dataclass(frozen=True)
class FrechetDistance(FrechetMetric):
    """Fréchet distance on any features."""


@register("sfid")
@dataclass(frozen=True)
class SpatialFrechetDistance(FrechetMetric):
    """Fréchet distance on Inception's spatial features (sFID)."""

    accumulator = SpatialMoments

    def score(self, sides: Sides) -> MetricValue:
        assert isinstance(sides.generated, SpatialMoments)
        spatial = sides.generated.statistics
        assert spatial is not None, "the samples were counted"
        return self._frechet(spatial.moments(), sides.reference.spatial, sides.reference)


@register("is")
@dataclass(frozen=True)
class InceptionScore(Metric):
    """Inception Score, over ten splits."""

    better = "max"
    accumulator = ClassSums
    compares = False

    def score(self, sides: Sides) -> MetricValue:
        assert isinstance(sides.generated, ClassSums)
        sums = sides.generated.sums
        if sums is None or not sums.counts.all():
            raise ScoreError(
                f"is needs a sample in each of its {SPLITS} splits, there are {sides.count} samples."
            )
        flags: tuple[str, ...] = ()
        if sums.counts.min() < sums.classes:
            flags = (
                f"is has splits of {sums.counts.min()} images for {sums.classes} classes: fewer images than classes, so it is too low.",
            )
        return MetricValue(*sums.score(), flags=flags)


@register("kid")
@dataclass(frozen=True)
class KernelInceptionDistance(Metric):
    """Kernel distance of two sets of features (KID), over subsets."""

    better = "min"
    accumulator = FeatureReservoir

    def score(self, sides: Sides) -> MetricValue:
        ours, theirs = kept_features("kid", sides)
        size = min(SUBSET_SIZE, len(ours), len(theirs))
        if size < 2:
            raise ScoreError(
                f"kid needs at least 2 images on each side, there are {len(ours)} and {len(theirs)}."
            )
        small = f"kid is over subsets of {size} images, for there are no {SUBSET_SIZE}."
        flags = (small,) if size < SUBSET_SIZE else ()
        return MetricValue(*kernel_distance(ours, theirs, subset_size=size), flags=flags)


class ManifoldMetric(Metric):
    """Precision and recall, of which both are computed together."""

    better = "max"
    accumulator = FeatureReservoir
    place: int
    """Place of the value in the pair."""

    def score(self, sides: Sides) -> MetricValue:
        values, flags = sides.once("manifolds", lambda: _manifolds(sides))
        return MetricValue(values[self.place], flags=flags)


@register("precision")
@dataclass(frozen=True)
class Precision(ManifoldMetric):
    """Share of generated images on the manifold of the real ones."""

    place = 0


@register("recall")
@dataclass(frozen=True)
class Recall(ManifoldMetric):
    """Share of real images on the manifold of the generated ones."""

    place = 1


@register("label_agreement")
@dataclass(frozen=True)
class LabelAgreementShare(Metric):
    """Share of images for which a classifier predicts the label that they were generated for."""

    better = "max"
    accumulator = LabelAgreement
    compares = False

    def score(self, sides: Sides) -> MetricValue:
        assert isinstance(sides.generated, LabelAgreement)
        return MetricValue(sides.generated.matches / sides.count)


def _manifolds(sides: Sides) -> tuple[tuple[float, float], tuple[str, ...]]:
    ours, theirs = kept_features("precision", sides)
    if min(len(ours), len(theirs)) <= NEIGHBOURS:
        raise ScoreError(
            f"precision and recall need at least {NEIGHBOURS + 1} images on each side, there are {len(ours)} and {len(theirs)}."
        )
    numbers = ("samples", len(ours), sides.count), ("real images", len(theirs), sides.reference.count)
    flags = tuple(
        f"precision and recall are of {kept} of the {count} {whose}."
        for whose, kept, count in numbers
        if count is not None and kept < count
    )
    radii = sides.reference.manifold(sides.device)
    return precision_recall(ours, theirs, device=sides.device, real_radii=radii), flags


def kept_features(name: str, sides: Sides) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N, D) features of generated images and (M, D) of real ones, of a metric that accumulates a FeatureReservoir.

    Raises ScoreError where the reference has none.
    """
    if sides.reference.samples is None:
        raise ScoreError(
            f"the reference {sides.reference.name} has no images or features of images, only their statistics: {name} needs them."
        )
    assert isinstance(sides.generated, FeatureReservoir)
    return sides.generated.reservoir.features, sides.reference.samples
