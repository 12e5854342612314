"""The gate lets a candidate pass that is better by more than the noise, and its noise is what the metric differs by."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from soflow_pipelines.metrics import METRICS, FeatureStatistics, GaussianMoments, frechet_distance
from soflow_platform.config.gate import GuardConfig
from soflow_platform.registry.gate import Comparison, mean_bound, refusals

DIM, SAMPLES, SEEDS, REPEATS = 6, 200, 5, 500
CONFIDENCE = 0.9
REAL = GaussianMoments(np.zeros(DIM), np.eye(DIM))


def comparison(
    candidate: tuple[float, ...],
    champion: tuple[float, ...] | None,
    metric: str = "fd",
    guard: GuardConfig | None = None,
) -> Comparison:
    return Comparison(metric, "pooled-1", METRICS[metric].better, candidate, champion, 0.95, guard)


def distance(generator: np.random.Generator, shift: float) -> float:
    """Fréchet distance of a set of Gaussian features with a known mean; its expectation is shift² and the same bias for each shift."""
    features: NDArray[np.float64] = generator.standard_normal((SAMPLES, DIM))
    features[:, 0] += shift
    statistics = FeatureStatistics(DIM)
    statistics.update(features)
    return frechet_distance(statistics, REAL)


def compared(generator: np.random.Generator, candidate: float, champion: float) -> Comparison:
    """Two networks whose features are Gaussian, scored under several seeds."""
    values = [tuple(distance(generator, shift) for _ in range(SEEDS)) for shift in (candidate, champion)]
    return Comparison("fd", "gaussian", "min", values[0], values[1], CONFIDENCE)


def allowed(rate: float) -> float:
    """Four standard deviations of a rate of REPEATS trials."""
    return 4 * math.sqrt(rate * (1 - rate) / REPEATS)


def test_the_noise_bounds_what_a_known_difference_is_missed_by() -> None:
    """Covers the true difference as often as the confidence says: not more seldom, and not always."""
    generator = np.random.default_rng(0)
    candidate, champion = 0.5, 0.6
    true = champion**2 - candidate**2
    covered = sum(
        each.gain - each.noise <= true
        for each in (compared(generator, candidate, champion) for _ in range(REPEATS))
    )
    assert abs(covered / REPEATS - CONFIDENCE) < allowed(CONFIDENCE)


def test_an_equal_candidate_passes_as_seldom_as_the_confidence_says() -> None:
    generator = np.random.default_rng(1)
    passed = sum(compared(generator, 0.5, 0.5).is_better for _ in range(REPEATS))
    assert abs(passed / REPEATS - (1 - CONFIDENCE)) < allowed(CONFIDENCE)


def test_a_much_better_candidate_passes() -> None:
    generator = np.random.default_rng(2)
    assert all(compared(generator, 0.1, 1.0).is_better for _ in range(50))


def test_the_bound_is_students() -> None:
    # The 95% point of Student's distribution with 4 degrees of freedom is 2.1318.
    differences = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert mean_bound(differences, 0.95) == pytest.approx(
        2.1318 * np.std(differences, ddof=1) / 5**0.5, rel=1e-4
    )


def test_noise_that_both_share_does_not_count() -> None:
    """The same seeds move both values alike, and only their difference decides."""
    assert comparison((10.0, 20.0, 30.1), (11.0, 21.0, 31.0)).is_better
    assert not comparison((10.0, 20.0, 30.1), (21.0, 31.0, 11.0)).is_better


@pytest.mark.parametrize(("metric", "better", "worse"), [("fd", 1.0, 2.0), ("precision", 0.9, 0.5)])
def test_which_way_is_better_depends_on_the_metric(metric: str, better: float, worse: float) -> None:
    high, low = (better, better + 0.01), (worse, worse + 0.01)
    assert refusals([comparison(high, low, metric)]) == []
    (reason,) = refusals([comparison(low, high, metric)])
    assert f"{metric} on pooled-1 is" in reason
    assert "which is not more than the noise" in reason


def test_equal_values_are_not_better() -> None:
    assert refusals([comparison((1.0, 1.0), (1.0, 1.0))])


def test_nan_never_passes() -> None:
    nan = (math.nan, math.nan)
    guard = GuardConfig(metric="fd", limit=5)
    for values in ((nan, (1.0, 1.0)), ((1.0, 1.0), nan)):
        assert refusals([comparison(*values)])
        assert refusals([comparison(*values, guard=GuardConfig(metric="fd"))])
    assert refusals([comparison(nan, None, guard=guard)])


def test_a_guard_allows_its_tolerance_and_the_noise() -> None:
    guard = GuardConfig(metric="recall", tolerance=0.1)
    champion = (0.8, 0.8, 0.8)
    assert refusals([comparison((0.73, 0.73, 0.73), champion, "recall", guard)]) == []
    (reason,) = refusals([comparison((0.7, 0.7, 0.7), champion, "recall", guard)])
    assert "worse by 0.1, which is more than the tolerance 0.08 and the noise 0" in reason
    assert refusals([comparison((0.6, 0.7, 0.8), champion, "recall", guard)]) == []


@pytest.mark.parametrize(
    ("metric", "limit", "reached", "missed"), [("fd", 5.0, 4.0, 6.0), ("recall", 0.5, 0.6, 0.4)]
)
def test_a_limit_holds_for_a_first_champion_too(
    metric: str, limit: float, reached: float, missed: float
) -> None:
    guard = GuardConfig(metric=metric, limit=limit)
    assert refusals([comparison((reached, reached), None, metric, guard)]) == []
    (reason,) = refusals([comparison((missed, missed), None, metric, guard)])
    assert reason.endswith(f"does not reach the limit {limit:g}")


def test_a_sweep_file_takes_every_metric_that_there_is() -> None:
    assert [GuardConfig(metric=name).metric for name in METRICS] == list(METRICS)
    with pytest.raises(ValueError, match="there is no metric 'FID'; there are fid,"):
        GuardConfig(metric="FID")
