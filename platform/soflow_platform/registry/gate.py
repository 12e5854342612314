"""The gate before the champion: compares the scores of two versions, seed by seed, and decides.

Both versions are scored under the same seeds. The differences of one metric, seed by seed, are independent and of one distribution, so
that their mean has Student's one-sided bound t s / sqrt(n); that bound is the noise of the difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

from soflow_platform.config.gate import GuardConfig


@dataclass(frozen=True)
class Comparison:
    """The values of one metric for the candidate and the champion, one for each seed."""

    metric: str
    features: str
    """Id of the feature network."""
    better: Literal["min", "max"]
    candidate: tuple[float, ...]
    champion: tuple[float, ...] | None
    """None where there is no champion."""
    confidence: float = 0.95
    guard: GuardConfig | None = None
    """None: this metric decides."""

    @property
    def name(self) -> str:
        """Metric and features, for a person."""
        return f"{self.metric} on {self.features}"

    @property
    def value(self) -> float:
        """Mean of the candidate."""
        return float(np.mean(self.candidate))

    @property
    def champion_value(self) -> float | None:
        """Mean of the champion."""
        return None if self.champion is None else float(np.mean(self.champion))

    @property
    def gain(self) -> float:
        """By how much the candidate is better, on average over the seeds; nan without a champion."""
        return math.nan if self.champion is None else float(np.mean(self._gains))

    @property
    def noise(self) -> float:
        """Bound of what `gain` differs by chance, one-sided, with the probability `confidence`; nan without a champion."""
        if self.champion is None:
            return math.nan
        return mean_bound(self._gains, self.confidence)

    @property
    def is_better(self) -> bool:
        """Whether the candidate is better by more than the noise; never where a value is nan."""
        return self.gain > self.noise

    @property
    def refusal(self) -> str | None:
        """Why this metric refuses the candidate; None where it does not."""
        if self.guard is None:
            return self._not_better()
        return self._worse(self.guard)

    def as_json(self) -> dict[str, Any]:
        """The numbers, for a tag."""
        return {
            "metric": self.metric,
            "features": self.features,
            "role": "decides" if self.guard is None else "guard",
            "candidate": list(self.candidate),
            "champion": None if self.champion is None else list(self.champion),
            "gain": None if self.champion is None else self.gain,
            "noise": None if self.champion is None else self.noise,
            "passed": self.refusal is None,
        }

    @property
    def _gains(self) -> list[float]:
        sign = 1 if self.better == "max" else -1
        return [sign * (new - old) for new, old in zip(self.candidate, self.champion or (), strict=True)]

    def _not_better(self) -> str | None:
        if self.champion is None or self.is_better:
            return None
        return (
            f"{self.name} is {self.value:.5g}, the champion's {self.champion_value:.5g}: better by {self.gain:.3g}, which is not "
            f"more than the noise {self.noise:.3g}"
        )

    def _worse(self, guard: GuardConfig) -> str | None:
        if guard.limit is not None:
            reached = self.value <= guard.limit if self.better == "min" else self.value >= guard.limit
            if not reached:
                return f"{self.name} is {self.value:.5g} and does not reach the limit {guard.limit:g}"
        if self.champion_value is None:
            return None
        allowed = guard.tolerance * abs(self.champion_value)
        if self.gain + self.noise >= -allowed:
            return None
        return (
            f"{self.name} is {self.value:.5g}, the champion's {self.champion_value:.5g}: worse by {-self.gain:.3g}, which is more "
            f"than the tolerance {allowed:.3g} and the noise {self.noise:.3g}"
        )


def mean_bound(differences: Sequence[float], confidence: float) -> float:
    """One-sided Student bound of the mean of independent differences, at least 2 of them."""
    count = len(differences)
    spread = float(np.std(differences, ddof=1))
    return float(stdtrit(count - 1, confidence)) * spread / math.sqrt(count)


def refusals(comparisons: Sequence[Comparison]) -> list[str]:
    """Why the comparisons refuse the candidate, one sentence each; empty where they let it pass."""
    return [reason for each in comparisons if (reason := each.refusal) is not None]
