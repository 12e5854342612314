"""Numbers that were computed under several seeds: their mean and spread, and which of several means differ by more than that."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

SIGNIFICANCE = 0.05
"""Chance that means of equally good things are called different, for all pairs of them together."""
FEWEST_PAIRED = 4
"""Seeds from which on two means are compared seed by seed; with fewer the differences alone say too little about their spread."""


@dataclass(frozen=True)
class SeedMean:
    """Mean of values under several seeds."""

    mean: float
    std: float | None
    """Sample standard deviation of one value; None of a single one."""
    seeds: int
    by_seed: Mapping[int, float] = field(default_factory=dict)
    """The values by their seeds; empty where the seeds are not known."""

    @classmethod
    def of(cls, values: Sequence[float] | Mapping[int, float]) -> SeedMean:
        """Of at least one value. Where one is not finite, so are mean and deviation."""
        by_seed = dict(values) if isinstance(values, Mapping) else {}
        values = list(values.values()) if isinstance(values, Mapping) else values
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            return cls(mean, math.nan if len(values) > 1 else None, len(values), by_seed)
        return cls(
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else None,
            len(values),
            by_seed,
        )

    def less(self, other: SeedMean) -> SeedMean | None:
        """Mean and spread of the differences at equal seeds; None where the two have not the same seeds, at least two of them.

        What a seed does to both, such as a lucky start, is not in them.
        """
        if len(self.by_seed) < 2 or set(self.by_seed) != set(other.by_seed):
            return None
        return SeedMean.of({seed: value - other.by_seed[seed] for seed, value in self.by_seed.items()})


def differing(means: Sequence[SeedMean]) -> dict[tuple[int, int], bool]:
    """Whether the i-th and the j-th mean differ by more than their seeds do, by (i, j), i < j; pairs with a single seed are left out.

    Student's t-test of the differences at equal seeds where two have the same seeds, FEWEST_PAIRED at least, else Welch's t-test;
    with Holm's correction for the number of pairs: the chance that any two of equal expectation are said to differ is at most
    SIGNIFICANCE.
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
    """Chance of so large a difference of two means of the same expectation; 1 where one is not finite."""
    difference = one.less(other) if one.seeds >= FEWEST_PAIRED else None
    return _of_pairs(difference) if difference else _of_groups(one, other)


def _of_pairs(difference: SeedMean) -> float:
    from scipy.stats import t

    if difference.std is None or not math.isfinite(difference.mean):
        return 1.0
    if difference.std == 0:
        return 1.0 if difference.mean == 0 else 0.0
    statistic = difference.mean / difference.std * math.sqrt(difference.seeds)
    return float(2 * t.sf(abs(statistic), difference.seeds - 1))


def _of_groups(one: SeedMean, other: SeedMean) -> float:
    from scipy.stats import ttest_ind_from_stats

    if one.std == other.std == 0:
        return 1.0 if one.mean == other.mean else 0.0
    test = ttest_ind_from_stats(
        one.mean, one.std, one.seeds, other.mean, other.std, other.seeds, equal_var=False
    )
    return 1.0 if math.isnan(test.pvalue) else float(test.pvalue)
