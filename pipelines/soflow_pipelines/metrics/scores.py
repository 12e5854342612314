"""Scores from statistics. A score that would mislead is refused or flagged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from soflow_pipelines.metrics.accumulators import ScoreError
from soflow_pipelines.metrics.reference import Reference
from soflow_pipelines.metrics.registry import METRICS, Sides
from soflow_pipelines.metrics.score_statistics import ScoreStatistics, format_size
from soflow_pipelines.metrics.version import EVALUATOR


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
    # Distances first: what is wrong with a reference is said before a number is computed.
    compared = [name for name in selected if METRICS[name].compares]
    if compared:
        reference = _comparable(generated, reference, result)
    shared: dict[str, Any] = {}
    for name in [*compared, *(name for name in selected if name not in compared)]:
        part = generated.parts[METRICS[name].accumulator.name]
        sides = Sides(part, generated.count, reference, torch.device(device), shared)
        measured = METRICS[name]().score(sides)
        result.values[name] = measured.value
        if measured.spread is not None:
            result.spread[name] = measured.spread
        result.flags.extend(flag for flag in measured.flags if flag not in result.flags)
    return result


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
