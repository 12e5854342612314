"""Mean and spread over seeds, and which means differ."""

from __future__ import annotations

import math
import random

import pytest

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
