"""The Fréchet distance and the statistics under it; label agreement."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from soflow_pipelines.metrics import FeatureStatistics, GaussianMoments, frechet_distance
from soflow_pipelines.metrics.label_agreement import count_label_matches


def gathered(features: np.ndarray, cuts: list[int]) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    for part in np.split(features, cuts):
        statistics.update(part)
    return statistics


def gaussian(mean: list[float], covariance: list[list[float]] | np.ndarray) -> GaussianMoments:
    return GaussianMoments(np.array(mean, np.float64), np.array(covariance, np.float64))


def rotation(dim: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]


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
    other = gathered(features[30:], [20])
    before = other.covariance.copy()
    merged.merge(other)
    merged.merge(FeatureStatistics(6))
    whole = gathered(features, [])
    assert merged.count == 100
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=0, atol=1e-14)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(other.covariance, before)


def test_the_state_brings_the_statistics_back(tmp_path) -> None:
    statistics = gathered(np.random.default_rng(1).normal(size=(9, 3)), [])
    np.savez(tmp_path / "state.npz", **statistics.state())
    with np.load(tmp_path / "state.npz") as state:
        again = FeatureStatistics.from_state(state)
    again.update(np.ones((1, 3)))
    statistics.update(np.ones((1, 3)))
    np.testing.assert_array_equal(again.covariance, statistics.covariance)


def test_the_distance_of_gaussians_on_a_line_is_the_closed_form() -> None:
    assert frechet_distance(gaussian([1], [[9]]), gaussian([5], [[4]])) == 4**2 + (3 - 2) ** 2


def test_the_distance_of_gaussians_with_the_same_axes_is_the_closed_form() -> None:
    a, b = np.array([4.0, 9.0, 0.0, 1.0]), np.array([1.0, 16.0, 25.0, 0.0])
    exact = ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(gaussian([0] * 4, np.diag(a)), gaussian([0] * 4, np.diag(b))) == exact
    q = rotation(4, 1)
    turned = frechet_distance(gaussian([0] * 4, q * a @ q.T), gaussian([0] * 4, q * b @ q.T))
    assert turned == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_a_scaled_gaussian_is_at_the_closed_form(factor: float) -> None:
    root = np.random.default_rng(5).normal(size=(6, 6))
    covariance = root @ root.T
    scaled = gaussian([0] * 6, factor**2 * covariance)
    exact = (1 - factor) ** 2 * np.trace(covariance)
    assert frechet_distance(gaussian([0] * 6, covariance), scaled) == pytest.approx(exact, rel=1e-10)


def test_gaussians_on_lines_of_their_own_are_at_the_closed_form() -> None:
    """Covariances uuᵀ and vvᵀ have rank one, and tr (uuᵀ vvᵀ)^½ is |u·v|."""
    rng = np.random.default_rng(6)
    u, v = rng.normal(size=(2, 200))
    exact = u @ u + v @ v - 2 * abs(u @ v)
    a, b = gaussian([0] * 200, np.outer(u, u)), gaussian([0] * 200, np.outer(v, v))
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-6)


def test_variances_over_sixteen_orders_of_magnitude_keep_the_closed_form() -> None:
    variances = np.logspace(-16, 0, 33)
    q = rotation(33, 7)
    a, b = (q * variances) @ q.T, (q * variances[::-1]) @ q.T
    exact = ((np.sqrt(variances) - np.sqrt(variances[::-1])) ** 2).sum()
    assert frechet_distance(gaussian([0] * 33, a), gaussian([0] * 33, b)) == pytest.approx(exact, rel=1e-6)


def test_the_distance_is_that_of_scipys_matrix_root() -> None:
    rng = np.random.default_rng(2)
    a = gathered(rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), [])
    b = gathered(rng.normal(size=(300, 5)) @ rng.normal(size=(5, 5)) + 1.0, [])
    shift = a.mean - b.mean
    root = sqrtm(a.covariance @ b.covariance).real
    expected = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


def test_the_distance_is_torch_fidelitys() -> None:
    rng = np.random.default_rng(8)
    mix = rng.normal(size=(48, 48))
    a, b = rng.normal(size=(400, 48)) @ mix, rng.normal(size=(300, 48)) @ mix * 1.3 + 0.2
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(torch.from_numpy(a)),
        fid_features_to_statistics(torch.from_numpy(b)),
        False,
    )
    ours = frechet_distance(gathered(a, [7, 300]), gathered(b, []))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-10)


def test_a_shift_alone_gives_its_squared_length() -> None:
    features = np.random.default_rng(3).normal(size=(50, 4))
    moved = gathered(features + np.array([3.0, 0, 4.0, 0]), [])
    assert frechet_distance(gathered(features, []), moved) == pytest.approx(25.0, rel=1e-12)


def test_a_set_has_distance_zero_from_itself() -> None:
    """This holds with fewer images than features, where covariances are singular."""
    few = gathered(np.random.default_rng(4).normal(size=(5, 64)), [])
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("features", [np.ones((2, 3)), np.full((2, 4), np.nan), np.ones(4)])
def test_features_that_do_not_fit_are_refused(features: np.ndarray) -> None:
    with pytest.raises(ValueError, match="feature"):
        FeatureStatistics(4).update(features)


def test_a_covariance_of_one_vector_is_refused() -> None:
    statistics = gathered(np.ones((1, 2)), [])
    with pytest.raises(ValueError, match="at least 2"):
        frechet_distance(statistics, statistics)


def test_moments_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        gaussian([0, 0], [[1]])
    with pytest.raises(ValueError, match="not finite"):
        gaussian([np.nan], [[1]])
    with pytest.raises(ValueError, match="1 and 2 features"):
        frechet_distance(gaussian([0], [[1]]), gaussian([0, 0], np.eye(2)))


def test_agreement_counts_the_labels_met() -> None:
    logits = torch.eye(4)
    assert count_label_matches(logits, torch.tensor([0, 1, 2, 0])) == 3
    with pytest.raises(ValueError, match="do not fit"):
        count_label_matches(logits, torch.zeros(3))
