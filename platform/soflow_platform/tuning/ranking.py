"""Ranking of the points of a sweep: each by the mean over its seeds, with their spread."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from soflow_platform.tuning.seed_statistics import SeedMean, differing

SEED = "seed"


@dataclass(frozen=True)
class ScoredTrial:
    """A trial with its best value of the metric; None where it has none or has failed."""

    name: str
    settings: Mapping[str, Any]
    value: float | None


@dataclass(frozen=True)
class RankedPoint:
    """Trials that differ in their seed alone."""

    settings: Mapping[str, Any]
    """What they have in common."""
    trials: tuple[ScoredTrial, ...]
    """Best first; those without a value last."""

    @property
    def values(self) -> list[float]:
        return [trial.value for trial in self.trials if trial.value is not None]

    @property
    def score(self) -> SeedMean | None:
        """Over the seeds that have a value; None where none has."""
        by_seed = {
            trial.settings[SEED]: trial.value
            for trial in self.trials
            if trial.value is not None and SEED in trial.settings
        }
        values = self.values
        return SeedMean.of(by_seed if len(by_seed) == len(values) else values) if values else None

    @property
    def mean(self) -> float | None:
        return self.score.mean if self.score else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for fewer than two."""
        return self.score.std if self.score else None

    @property
    def complete(self) -> bool:
        """Whether every seed has a value."""
        return len(self.values) == len(self.trials)


def sort_key(value: float | None, mode: str) -> float:
    """Of a score, for the best first; NaN and none come last."""
    if value is None or math.isnan(value):
        return math.inf
    return value if mode == "min" else -value


def ranked_points(trials: Sequence[ScoredTrial], mode: str) -> list[RankedPoint]:
    """The points, best mean first; of equals the earlier. Those of which a seed failed come after those of which none did."""
    groups: dict[str, list[ScoredTrial]] = {}
    for trial in trials:
        groups.setdefault(_key(trial.settings), []).append(trial)
    points = [
        RankedPoint(
            {key: value for key, value in group[0].settings.items() if key != SEED},
            tuple(sorted(group, key=lambda trial: sort_key(trial.value, mode))),
        )
        for group in groups.values()
    ]
    return sorted(
        points, key=lambda point: (not point.values, not point.complete, sort_key(point.mean, mode))
    )


@dataclass(frozen=True)
class Gap:
    """The score of a point less that of the best one."""

    mean: float
    std: float | None
    """Of the differences at equal seeds; None where the two have not the same seeds."""
    decided: bool | None
    """Whether it is more than the seeds make of it; None where one of the two has a single seed."""


def gaps_to_best(points: Sequence[RankedPoint]) -> list[Gap | None]:
    """For each of the ranked points; None for the best one itself, and for those without a value."""
    scored = [(place, score) for place, point in enumerate(points) if (score := point.score) is not None]
    found: list[Gap | None] = [None] * len(points)
    decided = differing([score for _, score in scored])
    for number, (place, score) in enumerate(scored):
        if number:
            paired = score.less(scored[0][1])
            mean = score.mean - scored[0][1].mean
            found[place] = Gap(mean, paired.std if paired else None, decided.get((0, number)))
    return found


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(
        {key: value for key, value in settings.items() if key != SEED}, sort_keys=True, default=str
    )
