"""Numbers that were computed under several seeds: their mean and spread, and which of several means differ by more than that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

SIGNIFICANCE = 0.05
"""Chance that means of equally good things are called different, for all pairs of them together."""


@dataclass(frozen=True)
class SeedMean:
    """Mean of values under several seeds."""

    mean: float
    std: float | None
    """Sample standard deviation of one value; None of a single one."""
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> SeedMean:
        """Of at least one value. Where one is not finite, so are mean and deviation."""
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            return cls(mean, math.nan if len(values) > 1 else None, len(values))
        return cls(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
        )


def differing(means: Sequence[SeedMean]) -> dict[tuple[int, int], bool]:
    """Whether the i-th and the j-th mean differ by more than their seeds do, by (i, j), i < j; pairs with a single seed are left out.

    Welch's t-test of each pair, with Holm's correction for their number: the chance that any two of equal expectation are said to
    differ is at most SIGNIFICANCE.
    """
    pairs = [
        pair for pair in combinations(range(len(means)), 2) if all(means[i].std is not None for i in pair)
    ]
    chances = {(i, j): _chance(means[i], means[j]) for i, j in pairs}
    ordered = sorted(pairs, key=lambda pair: chances[pair])
    found = dict.fromkeys(pairs, False)
    for number, pair in enumerate(ordered):
        if chances[pair] >= SIGNIFICANCE / (len(ordered) - number):
            break
        found[pair] = True
    return found


def _chance(one: SeedMean, other: SeedMean) -> float:
    """Chance of so large a difference of two means of the same expectation, by Welch's t-test; 1 where one is not finite."""
    from scipy.stats import ttest_ind_from_stats

    if one.std == other.std == 0:
        return 1.0 if one.mean == other.mean else 0.0
    test = ttest_ind_from_stats(
        one.mean, one.std, one.seeds, other.mean, other.std, other.seeds, equal_var=False
    )
    return 1.0 if math.isnan(test.pvalue) else float(test.pvalue)
