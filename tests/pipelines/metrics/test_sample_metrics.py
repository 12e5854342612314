"""Metrics of samples one by one: the Inception Score, the kernel distance, precision and recall, and the reservoir under them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from soflow_pipelines.metrics.inception_score import InceptionScoreSums
from soflow_pipelines.metrics.kid import kernel_distance, squared_mmd
from soflow_pipelines.metrics.precision_recall import precision_recall, squared_radii
from soflow_pipelines.metrics.reservoir import Reservoir, splitmix64


def score(logits: np.ndarray) -> tuple[float, float]:
    sums = InceptionScoreSums(logits.shape[1], len(logits))
    sums.update(np.arange(len(logits)), torch.from_numpy(logits))
    return sums.score()


def test_certain_balanced_predictions_score_the_number_of_classes() -> None:
    logits = np.empty((80, 8))
    logits[permuted(80)] = np.tile(np.eye(8) * 1000.0, (10, 1))
    assert score(logits) == (pytest.approx(8, rel=1e-14), pytest.approx(0, abs=1e-14))


def test_predictions_that_are_all_the_same_score_one() -> None:
    logits = np.tile(np.random.default_rng(0).normal(size=(1, 5)), (30, 1))
    assert score(logits)[0] == pytest.approx(1, rel=1e-14)


def permuted(count: int) -> np.ndarray:
    """The numbers 0 .. count - 1 in the fixed permutation."""
    return np.argsort(splitmix64(np.arange(count)))


@pytest.mark.parametrize("count", [10, 97, 250])
def test_the_inception_score_is_that_of_torch_fidelity(count: int) -> None:
    """torch-fidelity gets the samples in the order of the fixed permutation."""
    logits = np.random.default_rng(1).normal(size=(count, 7)) * 3
    theirs = isc_features_to_metric(torch.from_numpy(logits[permuted(count)]), splits=10, shuffle=False)
    mean, spread = score(logits)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert spread == pytest.approx(theirs["inception_score_std"], rel=1e-10)


def test_the_inception_score_is_that_of_the_adm_evaluator() -> None:
    """Splits have equal sizes, as in the evaluator."""
    logits = np.random.default_rng(2).normal(size=(200, 6))
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    values = []
    for rows in permuted(200).reshape(10, 20):
        part = shares[rows]
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        values.append(np.exp(divergence.mean()))
    assert score(logits)[0] == pytest.approx(np.mean(values), rel=1e-12)


def test_images_sorted_by_class_score_as_in_any_order() -> None:
    rng = np.random.default_rng(11)
    classes = np.arange(2000) * 10 // 2000
    logits = np.eye(10)[classes] * 6 + rng.normal(size=(2000, 10))
    mixture, _ = score(logits[rng.permutation(2000)])
    assert mixture > 7
    assert score(logits)[0] == pytest.approx(mixture, rel=0.02)


def test_sums_of_parts_in_any_order_give_the_whole_inception_score() -> None:
    logits = np.random.default_rng(3).normal(size=(53, 4))
    order = np.random.default_rng(4).permutation(53)
    parts = []
    for indices in np.split(order, [5, 20, 50]):
        sums = InceptionScoreSums(4, 53)
        sums.update(indices, torch.from_numpy(logits[indices]))
        parts.append(InceptionScoreSums.from_state(sums.state()))
    whole = parts[0]
    for part in parts[1:]:
        whole.merge(part)
    assert whole.score() == pytest.approx(score(logits), rel=1e-12)
    with pytest.raises(ValueError, match="cannot join"):
        whole.merge(InceptionScoreSums(4, 54))


def test_samples_outside_those_planned_have_no_split() -> None:
    sums = InceptionScoreSums(2, 10)
    with pytest.raises(ValueError, match="from 0 to 9"):
        sums.update(np.array([10]), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="each of 10 splits"):
        sums.score()


def brute_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Every pair of two different samples, one by one."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(s: np.ndarray) -> float:
        pairs = [k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]
        return sum(pairs) / len(pairs)

    between = [k(a, b) for a in x for b in y]
    return within(x) + within(y) - 2 * sum(between) / len(between)


def test_the_squared_mmd_is_the_sum_over_all_pairs() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.integers(-3, 4, (5, 4)), rng.integers(-3, 4, (7, 4))
    assert squared_mmd(x, y) == pytest.approx(brute_mmd(x, y), rel=1e-13)


def test_the_kernel_distance_over_the_whole_sets_is_the_mmd_itself() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 1
    mean, spread = kernel_distance(x, y, subsets=3, subset_size=30)
    assert mean == pytest.approx(squared_mmd(x, y), rel=1e-10)
    assert spread == pytest.approx(0, abs=1e-10)


def test_the_kernel_distance_draws_torch_fidelitys_subsets() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(50, 8)) + 0.3
    theirs = kid_features_to_metric(
        torch.from_numpy(x), torch.from_numpy(y), kid_subset_size=20, verbose=False
    )
    mean, spread = kernel_distance(x, y, subset_size=20)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-12)
    assert spread == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-12)


@pytest.mark.parametrize("size", [1, 11])
def test_subsets_larger_than_a_set_or_of_one_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        kernel_distance(np.ones((10, 2)), np.ones((20, 2)), subset_size=size)


def brute_precision_recall(fake: np.ndarray, real: np.ndarray, k: int = 3) -> tuple[float, float]:
    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        inside = 0
        for point in points:
            for number, centre in enumerate(centres):
                others = [((o - centre) ** 2).sum() for j, o in enumerate(centres) if j != number]
                if ((point - centre) ** 2).sum() <= sorted(others)[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return covered(fake, real), covered(real, fake)


@given(st.integers(0, 2**32 - 1), st.integers(4, 20), st.integers(4, 20))
@settings(max_examples=40, deadline=None)
def test_precision_and_recall_are_the_brute_force_counts(seed: int, generated: int, real: int) -> None:
    """On a grid of integers distances are exact, and many are equal."""
    rng = np.random.default_rng(seed)
    fake, true = rng.integers(-3, 4, (generated, 2)), rng.integers(-2, 6, (real, 2))
    assert precision_recall(fake, true) == brute_precision_recall(fake, true)


def test_precision_and_recall_are_torch_fidelitys() -> None:
    rng = np.random.default_rng(8)
    fake, real = rng.normal(size=(80, 6)), rng.normal(size=(60, 6)) * 1.5
    theirs = prc_features_to_metric(torch.from_numpy(fake), torch.from_numpy(real), verbose=False)
    expected = theirs["precision"], theirs["recall"]
    assert 0 < expected[1] < expected[0] < 1
    assert precision_recall(fake, real) == pytest.approx(expected, abs=1e-7)


def test_precision_and_recall_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    fake, real = rng.normal(size=(40, 3)), rng.normal(size=(31, 3))
    whole = precision_recall(fake, real)
    monkeypatch.setattr("soflow_pipelines.metrics.precision_recall.BLOCK_ELEMENTS", 70)
    assert precision_recall(fake, real) == whole


def test_radii_that_are_known_give_the_same_precision_and_recall() -> None:
    rng = np.random.default_rng(11)
    fake, real = rng.normal(size=(40, 3)), rng.normal(size=(31, 3))
    radii = squared_radii(real)
    to_others = np.sort(((real[:, None] - real[None]) ** 2).sum(2), axis=1)
    assert radii == pytest.approx(to_others[:, 3], rel=1e-9)
    assert precision_recall(fake, real, real_radii=radii) == precision_recall(fake, real)
    assert precision_recall(fake, real, real_radii=0 * radii)[0] == 0


def test_copies_of_one_image_are_a_manifold_of_one_point() -> None:
    """Rounding must not give the ball around many copies of a vector a radius."""
    vector = np.random.default_rng(10).normal(size=2048).astype(np.float32) * 3
    copies = np.tile(vector, (6, 1))
    near = copies * np.float32(1.001)
    assert precision_recall(copies, copies) == (1.0, 1.0)
    assert precision_recall(near, copies) == (0.0, 0.0)


def test_three_neighbours_need_four_samples() -> None:
    with pytest.raises(ValueError, match="need 4 samples, there are 3 and 5"):
        precision_recall(np.ones((3, 2)), np.ones((5, 2)))


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_any_split_over_workers_keeps_the_same_samples(seed: int, capacity: int, workers: int) -> None:
    rng = np.random.default_rng(seed)
    indices = rng.permutation(60)[: rng.integers(1, 61)]
    features = np.stack([indices, indices * 2], 1).astype(np.float32)
    expected = sorted(sorted(indices.tolist(), key=lambda i: int(splitmix64(np.array([i]))[0]))[:capacity])
    owner = rng.integers(0, workers, len(indices))
    reservoirs = []
    for worker in range(workers):
        reservoir = Reservoir(2, capacity)
        for rows in np.array_split(np.flatnonzero(owner == worker), 3):
            reservoir.update(indices[rows], features[rows])
        reservoirs.append(Reservoir.from_state(reservoir.state()))
    merged = reservoirs[0]
    for reservoir in reservoirs[1:]:
        merged.merge(reservoir)
    assert merged.features[:, 0].tolist() == expected
    assert merged.features[:, 1].tolist() == [2 * i for i in expected]


def test_a_reservoir_does_not_choose_by_the_order_of_the_indices() -> None:
    reservoir = Reservoir(1, 1000)
    indices = np.arange(10_000)
    reservoir.update(indices, indices[:, None].astype(np.float32))
    kept = reservoir.features[:, 0]
    # 1000 of 10000 without replacement: the mean's standard deviation is 87, a tenth's count's 9.
    assert abs(kept.mean() - 4999.5) < 350
    assert np.abs(np.histogram(kept, 10, (0, 10_000))[0] - 100).max() < 40
    assert np.abs(np.bincount(kept.astype(int) % 10) - 100).max() < 40


def test_a_sample_that_comes_twice_is_refused() -> None:
    reservoir = Reservoir(1, 10)
    reservoir.update(np.array([3, 4]), np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="sample 4 came twice"):
        reservoir.update(np.array([4, 5]), np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="sample 6 came twice"):
        reservoir.update(np.array([6, 6]), np.ones((2, 1), np.float32))
