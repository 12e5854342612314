"""Scores from statistics. A score that would mislead is refused or flagged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

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
from soflow_pipelines.metrics.reference import Reference
from soflow_pipelines.metrics.registry import METRICS
from soflow_pipelines.metrics.score_statistics import ScoreStatistics, format_size
from soflow_pipelines.metrics.version import EVALUATOR

AccumulatorT = TypeVar("AccumulatorT", bound=Accumulator)


@dataclass(frozen=True)
class ScoreResult:
    """Scores by metric, with their flags, standard deviations and settings."""

    values: dict[str, float]
    flags: list[str] = field(default_factory=list)
    """Sentences: why a number is not comparable with others of its name."""
    spread: dict[str, float] = field(default_factory=dict)
    """Standard deviation of `is` over its splits and of `kid` over its subsets."""
    tags: dict[str, str] = field(default_factory=dict)
    """Settings that the values depend on: evaluator, feature network, samples, reference."""


def scores(
    generated: ScoreStatistics,
    reference: Reference | None = None,
    metrics: Iterable[str] | None = None,
    device: str | torch.device = "cpu",
) -> ScoreResult:
    """Scores of generated images against real ones, for all metrics of the statistics unless `metrics` names some.

    `device` computes the distances of precision and recall. Raises ScoreError where a number would not be what it seems: samples
    that are missing or counted twice, a reference of other features or another resolution, or without what the metric compares.
    """
    requested = generated.metrics if metrics is None else tuple(metrics)
    for name in requested:
        if name not in generated.metrics:
            raise ScoreError(f"{name} was not gathered; the statistics hold {', '.join(generated.metrics)}.")
    selected = [name for name in METRICS if name in requested]
    generated.check_complete()
    if generated.count < 2:
        raise ScoreError(f"a score needs at least 2 samples, there are {generated.count}.")
    result = ScoreResult({}, list(generated.warnings), tags=_tags(generated, reference))
    if any(METRICS[name].compares for name in selected):
        reference = _comparable(generated, reference, result)
        _distances(selected, generated, reference, result, torch.device(device))
    if "is" in selected:
        _inception_score(generated, result)
    if "label_agreement" in selected:
        result.values["label_agreement"] = _part(generated, LabelAgreement).matches / generated.count
    return result


def _part(statistics: ScoreStatistics, kind: type[AccumulatorT]) -> AccumulatorT:
    part = statistics.part(kind)
    assert part is not None, f"{', '.join(statistics.metrics)} without {kind.name}"
    return part


def _tags(generated: ScoreStatistics, reference: Reference | None) -> dict[str, str]:
    tags = {"evaluator": EVALUATOR, "features": generated.features, "samples": str(generated.count)}
    if reference is not None:
        tags["reference"] = reference.name
        tags["reference_samples"] = "unknown" if reference.count is None else str(reference.count)
    return tags


def _comparable(generated: ScoreStatistics, reference: Reference | None, result: ScoreResult) -> Reference:
    """The reference. Raises ScoreError where its features or its image size are others."""
    if reference is None:
        raise ScoreError("a distance needs a reference: the statistics of real images.")
    if reference.features != generated.features:
        raise ScoreError(
            f"the reference {reference.name} has the features {reference.features}, the samples {generated.features}: "
            "take the reference's statistics anew with the same feature network."
        )
    if reference.resolution is None:
        result.flags.append(
            f"The reference {reference.name} does not say the size of its images; the samples are {format_size(generated.resolution)}."
        )
    check_size(reference.name, reference.resolution, generated.resolution)
    result.flags.extend(warning for warning in reference.warnings if warning not in result.flags)
    return reference


def check_size(reference: str, theirs: tuple[int, int] | None, samples: tuple[int, int] | None) -> None:
    """Raises ScoreError where the images of a reference are known to have another size than the samples."""
    if theirs is not None and theirs != samples:
        raise ScoreError(
            f"the images of the reference {reference} are {format_size(theirs)}, the samples {format_size(samples)}: take a "
            "reference of the samples' size."
        )


def _distances(
    selected: list[str],
    generated: ScoreStatistics,
    reference: Reference,
    result: ScoreResult,
    device: torch.device,
) -> None:
    for name in ("fid", "fd"):
        if name in selected:
            moments = _part(generated, Moments).statistics.moments()
            result.values[name] = _frechet(name, moments, reference.moments, reference, result)
    if "sfid" in selected:
        spatial = _part(generated, SpatialMoments).statistics
        assert spatial is not None, "the samples were counted"
        moments = spatial.moments()
        result.values["sfid"] = _frechet("sfid", moments, reference.spatial, reference, result)
    if "kid" in selected:
        _kernel_distance(generated, reference, result)
    if "precision" in selected or "recall" in selected:
        _manifolds(selected, generated, reference, result, device)


def _frechet(
    name: str,
    generated: GaussianMoments,
    real: GaussianMoments | None,
    reference: Reference,
    result: ScoreResult,
) -> float:
    if real is None:
        raise ScoreError(f"the reference {reference.name} lacks the statistics that {name} needs.")
    if real.dim != generated.dim:
        raise ScoreError(
            f"the reference {reference.name} has {real.dim} features for {name}, the samples {generated.dim}."
        )
    for whose, count in (("the samples", generated.count), (f"the reference {reference.name}", real.count)):
        if count is not None and count < generated.dim:
            result.flags.append(
                f"{name} of {count} images in {generated.dim} features: fewer images than features in {whose}, so the "
                "covariance is singular and the number is not comparable."
            )
    return frechet_distance(generated, real)


def _kernel_distance(generated: ScoreStatistics, reference: Reference, result: ScoreResult) -> None:
    ours, theirs = _kept("kid", generated, reference)
    size = min(SUBSET_SIZE, len(ours), len(theirs))
    if size < 2:
        raise ScoreError(
            f"kid needs at least 2 images on each side, there are {len(ours)} and {len(theirs)}."
        )
    if size < SUBSET_SIZE:
        result.flags.append(f"kid is over subsets of {size} images, for there are no {SUBSET_SIZE}.")
    result.values["kid"], result.spread["kid"] = kernel_distance(ours, theirs, subset_size=size)


def _manifolds(
    selected: list[str],
    generated: ScoreStatistics,
    reference: Reference,
    result: ScoreResult,
    device: torch.device,
) -> None:
    ours, theirs = _kept("precision", generated, reference)
    if min(len(ours), len(theirs)) <= NEIGHBOURS:
        raise ScoreError(
            f"precision and recall need at least {NEIGHBOURS + 1} images on each side, there are {len(ours)} and {len(theirs)}."
        )
    for whose, kept, count in (
        ("samples", len(ours), generated.count),
        ("real images", len(theirs), reference.count),
    ):
        if count is not None and kept < count:
            result.flags.append(f"precision and recall are of {kept} of the {count} {whose}.")
    values = precision_recall(ours, theirs, device=device)
    for name, value in zip(("precision", "recall"), values, strict=True):
        if name in selected:
            result.values[name] = value


def _kept(
    name: str, generated: ScoreStatistics, reference: Reference
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    if reference.samples is None:
        raise ScoreError(
            f"the reference {reference.name} has no images or features of images, only their statistics: {name} needs them."
        )
    return _part(generated, FeatureReservoir).reservoir.features, reference.samples


def _inception_score(generated: ScoreStatistics, result: ScoreResult) -> None:
    sums = _part(generated, ClassSums).sums
    if sums is None or not sums.counts.all():
        raise ScoreError(
            f"is needs a sample in each of its {SPLITS} splits, there are {generated.count} samples."
        )
    if sums.counts.min() < sums.classes:
        result.flags.append(
            f"is has splits of {sums.counts.min()} images for {sums.classes} classes: fewer images than classes, so it is too low."
        )
    result.values["is"], result.spread["is"] = sums.score()
