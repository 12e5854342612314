"""Fréchet distance and the statistics under it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from soflow_pipelines.metrics import FeatureStatistics, frechet_distance, label_agreement


def gathered(features: np.ndarray, cuts: list[int]) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in np.split(features, cuts):
        statistics.update(part)
    return statistics


@given(st.lists(st.integers(0, 50), max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_mean_and_covariance_do_not_depend_on_the_batches(cuts: list[int], seed: int) -> None:
    features = np.random.default_rng(seed).normal(1e4, 1.0, (50, 4))
    statistics = gathered(features, sorted(cuts))
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-8, atol=1e-10)


def test_merging_workers_is_the_same_as_one_worker_seeing_all() -> None:
    features = np.random.default_rng(1).normal(size=(100, 6))
    merged = gathered(features[:30], [])
    merged.merge(gathered(features[30:], [20]))
    merged.merge(FeatureStatistics(6))
    whole = gathered(features, [])
    assert merged.count == 100
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-12)


def test_the_state_brings_the_statistics_back(tmp_path) -> None:
    statistics = gathered(np.random.default_rng(1).normal(size=(9, 3)), [])
    np.savez(tmp_path / "state.npz", **statistics.state())
    with np.load(tmp_path / "state.npz") as state:
        again = FeatureStatistics.from_state(state)
    again.update(np.ones((1, 3)))
    statistics.update(np.ones((1, 3)))
    np.testing.assert_array_equal(again.covariance, statistics.covariance)


def test_the_distance_of_two_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(2)
    a = gathered(rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), [])
    b = gathered(rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1.0, [])
    shift = a.mean - b.mean
    root = sqrtm(a.covariance @ b.covariance).real
    expected = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-8)


def test_a_shift_alone_gives_its_squared_length() -> None:
    features = np.random.default_rng(3).normal(size=(50, 4))
    moved = gathered(features + np.array([3.0, 0, 4.0, 0]), [])
    assert frechet_distance(gathered(features, []), moved) == pytest.approx(25.0)


def test_a_set_is_at_no_distance_from_itself_even_with_fewer_images_than_features() -> None:
    few = gathered(np.random.default_rng(4).normal(size=(5, 64)), [])
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("features", [np.ones((2, 3)), np.full((2, 4), np.nan), np.ones(4)])
def test_features_that_do_not_fit_are_refused(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="feature"):
        FeatureStatistics(4).update(features)


def test_a_covariance_of_one_vector_is_refused() -> None:
    statistics = gathered(np.ones((1, 2)), [])
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(statistics, statistics)


def test_agreement_is_the_share_of_labels_met() -> None:
    logits = torch.eye(4)
    assert label_agreement(logits, torch.tensor([0, 1, 2, 0])) == 0.75
    with pytest.raises(ValueError, match="do not fit"):
        label_agreement(logits, torch.zeros(3))
