"""Decides at a rung of population-based training which trials are replaced by copies of better ones, and with which settings.

A pure function of the scores, the settings, the step and the seed: what Ray did first and when decides nothing, so that a sweep that is
run again, or that goes on after its driver was killed, decides the same. The rule is that of Jaderberg et al. (arXiv 1711.09846): the
worst share of the population copies members of the best share, and its settings are perturbed or drawn anew.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from soflow_platform.config.dimensions import Dimension
from soflow_platform.config.search import PbtConfig
from soflow_platform.tuning.lineage import Replacement, Rung
from soflow_platform.tuning.ranking import sort_key

ATTEMPTS = 100
"""Perturbations that are tried before the settings of the better trial are taken as they are."""
TAIL = 0.02
"""Quantile beyond which a setting with a normal distribution is not moved."""


@dataclass(frozen=True)
class Population:
    """What decisions depend on beside scores and settings."""

    config: PbtConfig
    mode: str
    """`min` or `max`: which score is better."""
    dimensions: Mapping[str, Dimension]
    allows: Callable[[Mapping[str, Any]], bool]
    """Whether settings can be trained: constraints and the checks of every section."""
    seed: int

    def decide(
        self,
        step: int,
        scores: Mapping[str, float],
        settings: Mapping[str, Mapping[str, Any]],
    ) -> Rung:
        """The decision at a step, from the score and the settings of each trial that has reached it; a score of NaN is the worst."""
        ranked = sorted(scores, key=lambda name: (sort_key(scores[name], self.mode), name))
        count = min(math.ceil(self.config.replaced * len(ranked)), len(ranked) // 2)
        best = [name for name in ranked[:count] if not math.isnan(scores[name])]
        replaced = []
        for trial in ranked[len(ranked) - count :] if best else []:
            draws = random.Random(f"pbt-{self.seed}-{step}-{trial}")
            source = draws.choice(best)
            after = self._moved(settings[source], draws)
            replaced.append(Replacement(trial, source, dict(settings[trial]), after))
        kept = {name: None if math.isnan(scores[name]) else scores[name] for name in ranked}
        return Rung(step, kept, replaced)

    def _moved(self, settings: Mapping[str, Any], draws: random.Random) -> dict[str, Any]:
        """Settings near those of a better trial; these themselves where no others can be trained."""
        for _ in range(ATTEMPTS):
            moved = {
                key: self._setting(self.dimensions[key], value, draws) if key in self.dimensions else value
                for key, value in settings.items()
            }
            if moved != settings and self.allows(moved):
                return moved
        return dict(settings)

    def _setting(self, dimension: Dimension, value: Any, draws: random.Random) -> Any:
        quantile = dimension.quantile(value)
        if quantile is None or draws.random() < self.config.resample:
            return dimension.at(draws.random())
        way = draws.choice((-1, 1))
        values = dimension.values
        if values is not None:
            return values[min(max(values.index(value) + way, 0), len(values) - 1)]
        tail = 0.0 if dimension.normal is None else TAIL
        return dimension.at(min(max(quantile + way * self.config.move, tail), 1 - max(tail, 1e-9)))
