"""Compares two registered versions by the scores that their sweeps stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from soflow_platform.tracking.store import FLAGS_TAG


class NotComparableError(ValueError):
    """Two versions were not scored in the same way."""


@dataclass(frozen=True)
class StoredScores:
    """The search metric of two versions, from one evaluation each and without its noise."""

    metric: str
    new: float
    old: float
    better: bool
    """Whether the new one is better."""


def stored_scores(version: Any, other: Any) -> StoredScores:
    """The scores of a version beside those of another one. Raises NotComparableError with what differs."""
    metric = version.tags.get("metric")
    # Remarks on the numbers are no settings that the numbers depend on.
    settings = {k for v in (version, other) for k in v.tags if k.startswith("eval.") and k != FLAGS_TAG}
    values = version.tags.get(metric), other.tags.get(metric)
    differing = [k for k in ("mode", *sorted(settings)) if version.tags.get(k) != other.tags.get(k)]
    if differing:
        raise NotComparableError(f"they differ in {', '.join(differing)}")
    if metric is None or None in values:
        raise NotComparableError(f"both need {metric or 'a metric'}")
    new, old = float(values[0]), float(values[1])
    return StoredScores(metric, new, old, new < old if version.tags["mode"] == "min" else new > old)
