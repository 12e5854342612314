"""The best evaluation of a sweep, as the model registry takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """The best evaluation of a sweep, to be registered."""

    model: str
    """Name of the registered model."""
    sweep: str
    trial: str
    step: int
    metric: str
    """The search metric, by which the trial was chosen."""
    mode: str
    """Whether a smaller ("min") or a larger ("max") value is better."""
    metrics: Mapping[str, float]
    """All metrics of that evaluation."""
