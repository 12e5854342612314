"""The metrics by name: which way is better, whether they compare with a reference, and what they accumulate.

A new metric is a row here, an accumulator where none of those there serves it, and a branch of `scores.scores`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.metrics.accumulators import (
    Accumulator,
    ClassSums,
    FeatureReservoir,
    LabelAgreement,
    Moments,
    ScoreError,
    SpatialMoments,
)


@dataclass(frozen=True)
class Metric:
    """A score of a set of images."""

    better: Literal["min", "max"]
    compares: bool
    """Whether it is taken against a reference."""
    accumulator: type[Accumulator]


METRICS: dict[str, Metric] = {
    "fid": Metric("min", True, Moments),
    "fd": Metric("min", True, Moments),
    "sfid": Metric("min", True, SpatialMoments),
    "is": Metric("max", False, ClassSums),
    "kid": Metric("min", True, FeatureReservoir),
    "precision": Metric("max", True, FeatureReservoir),
    "recall": Metric("max", True, FeatureReservoir),
    "label_agreement": Metric("max", False, LabelAgreement),
}

ACCUMULATORS: tuple[type[Accumulator], ...] = (
    Moments,
    SpatialMoments,
    ClassSums,
    FeatureReservoir,
    LabelAgreement,
)
"""Every accumulator, in the order of their arrays in a state file."""


def select_metrics(names: Iterable[str], network: FeatureNetwork) -> tuple[str, ...]:
    """The metrics of these names, in the registry's order.

    Raises ScoreError for a name that is no metric, for a metric that the network cannot give, and where there is none.
    """
    requested = set(names)
    unknown = sorted(requested - set(METRICS))
    if unknown:
        raise ScoreError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}.")
    missing = sorted(requested - network.metrics)
    if missing:
        able = ", ".join(name for name in METRICS if name in network.metrics)
        raise ScoreError(
            f"{missing[0]} cannot be measured on the features {network.id}; on them there are {able}."
        )
    if not requested:
        raise ScoreError("there is no metric to measure.")
    return tuple(name for name in METRICS if name in requested)


def accumulators_of(metrics: Iterable[str]) -> tuple[type[Accumulator], ...]:
    """The accumulators that these metrics need, each once."""
    needed = {METRICS[name].accumulator for name in metrics}
    return tuple(kind for kind in ACCUMULATORS if kind in needed)
