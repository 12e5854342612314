"""Mean and spread over seeds, and which means differ."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from scipy.stats import ttest_rel

from soflow_platform.tuning.seed_statistics import SIGNIFICANCE, SeedMean, differing


def test_mean_and_spread_are_those_of_the_values() -> None:
    assert SeedMean.of([7.0, 8.0, 9.0]) == SeedMean(8.0, 1.0, 3)
    assert SeedMean.of([7.5]) == SeedMean(7.5, None, 1)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_value_that_is_not_finite_shows_in_both_and_is_never_decided(broken: float) -> None:
    mean = SeedMean.of([7.0, broken])
    assert not math.isfinite(mean.mean)
    assert mean.std is not None
    assert math.isnan(mean.std)
    assert differing([mean, SeedMean(1.0, 0.1, 3)]) == {(0, 1): False}


def test_pairs_are_compared_at_their_number() -> None:
    """What two alone decide is not decided among six, where every pair could have been the one that differs by chance."""
    one, other = SeedMean(8.0, 1.0, 3), SeedMean(11.2, 1.0, 3)
    alike = [SeedMean(9.0 + 0.1 * number, 1.0, 3) for number in range(4)]
    assert differing([one, other]) == {(0, 1): True}
    assert not any(differing([one, other, *alike]).values())
    assert differing([one, SeedMean(80.0, 1.0, 3), *alike])[0, 1]


def test_a_single_seed_decides_nothing_and_equal_values_are_equal() -> None:
    alone, fixed = SeedMean(8.0, None, 1), SeedMean(8.0, 0.0, 2)
    assert differing([alone, fixed, fixed, SeedMean(9.0, 0.0, 2)]) == {
        (1, 2): False,
        (1, 3): True,
        (2, 3): True,
    }


def test_methods_that_are_equally_good_are_seldom_called_different() -> None:
    draw = random.Random(0)
    groups = [[SeedMean.of([draw.gauss(0, 1) for _ in range(3)]) for _ in range(5)] for _ in range(200)]
    corrected = sum(any(differing(means).values()) for means in groups)
    single = sum(any(differing(means[i : i + 2])[0, 1] for i in range(4)) for means in groups)
    assert corrected / len(groups) <= SIGNIFICANCE
    assert single > corrected


SEEDS = (30.0, -10.0, 55.0, 4.0, -21.0)
"""What a seed does to every training."""


def under_seeds(*values: float) -> SeedMean:
    return SeedMean.of(dict(enumerate(values)))


def test_what_a_seed_does_to_both_is_not_in_their_difference() -> None:
    one = under_seeds(*(100 + seed for seed in SEEDS))
    other = under_seeds(*(105 + seed + own for seed, own in zip(SEEDS, (1, -1, 0, 1, -1), strict=True)))
    assert other.less(one) == SeedMean(5.0, 1.0, 5, {0: 6.0, 1: 4.0, 2: 5.0, 3: 6.0, 4: 4.0})
    assert differing([one, other]) == {(0, 1): True}
    unknown = [replace(mean, by_seed={}) for mean in (one, other)]
    assert differing(unknown) == {(0, 1): False}


def test_means_of_other_seeds_or_of_few_are_compared_as_groups() -> None:
    one, shifted = under_seeds(*SEEDS), SeedMean.of({seed + 1: value + 5 for seed, value in enumerate(SEEDS)})
    assert shifted.less(one) is None
    assert differing([one, shifted]) == {(0, 1): False}
    few, more = under_seeds(*SEEDS[:3]), under_seeds(*(5 + seed for seed in SEEDS[:3]))
    assert more.less(few) == SeedMean(5.0, 0.0, 3, dict.fromkeys(range(3), 5.0))
    assert differing([few, more]) == {(0, 1): False}


def test_the_chance_of_a_difference_is_that_of_the_paired_test() -> None:
    """Against scipy's own, at a threshold on either side of it."""
    draw = random.Random(1)
    ones, others = ([draw.gauss(0, 1) for _ in range(6)] for _ in range(2))
    chance = ttest_rel(ones, others).pvalue
    shift = 0.0
    while chance >= SIGNIFICANCE:
        shift += 0.01
        chance = ttest_rel(ones, [value + shift for value in others]).pvalue
    nearly, just = (under_seeds(*(value + moved for value in others)) for moved in (shift - 0.01, shift))
    assert differing([under_seeds(*ones), just]) == {(0, 1): True}
    assert differing([under_seeds(*ones), nearly]) == {(0, 1): False}


def test_trainings_that_share_seeds_are_seldom_called_different_without_a_cause() -> None:
    draw = random.Random(2)
    wrong = 0
    for _ in range(200):
        seeds = [draw.gauss(0, 30) for _ in range(4)]
        wrong += any(
            differing([under_seeds(*(s + draw.gauss(0, 1) for s in seeds)) for _ in range(4)]).values()
        )
    assert wrong / 200 <= SIGNIFICANCE + 0.03
