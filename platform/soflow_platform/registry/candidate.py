"""An evaluation of a sweep, as the model registry takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """The best evaluation of a sweep or of one of its trials, to be registered."""

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
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the trial, as a sweep file has them."""
    trials: int = 1
    """Trials among which it was chosen."""
    grids: tuple[str, ...] = ()
    """Files with sample grids of that step."""
