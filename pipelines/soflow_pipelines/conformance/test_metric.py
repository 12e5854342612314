"""The contract of a metric, for every registered one or those of `--metric`, on random features."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_pipelines.features.network import Features
from soflow_pipelines.metrics import METRICS, Reference, ScoreStatistics, scores
from soflow_pipelines.metrics.registry import Metric

IMAGES, CLASSES, DIM = 120, 3, 4
SHAPE = (1, 4, 4)


class Pixels:
    """A feature network that gives everything: features, logits and spatial features are pixels."""

    id = "pixels-1"
    dim = DIM
    warnings: tuple[str, ...] = ()
    space: Literal["images", "training"] = "training"

    def __init__(self) -> None:
        self.metrics = frozenset(METRICS)

    def __call__(self, images: Tensor) -> Features:
        flat = images.flatten(1)
        return Features(flat[:, :DIM], flat[:, DIM : DIM + CLASSES], flat[:, :3])


def images(seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(seed)) + shift


LABELS = torch.arange(IMAGES) % CLASSES


def statistics(name: str, samples: Tensor, parts: int = 1, batch: int = 50) -> ScoreStatistics:
    """Taken by so many workers, each of every so many-th image, in batches from the last to the first."""
    whole: ScoreStatistics | None = None
    for part in range(parts):
        taken = ScoreStatistics(Pixels(), [name], samples=IMAGES)
        for indices in reversed(torch.arange(part, IMAGES, parts).split(batch)):
            taken.update(indices, samples[indices], LABELS[indices])
        if whole is None:
            whole = taken
        else:
            whole.merge(taken)
    assert whole is not None
    return whole


def reference(metric_class: type[Metric], seed: int = 1) -> Reference | None:
    if not metric_class.compares:
        return None
    return Reference.of(statistics(metric_class.name, images(seed)), "real")


def value(metric_class: type[Metric], taken: ScoreStatistics, real: Reference | None) -> float:
    return scores(taken, real).values[metric_class.name]


def test_it_is_a_finite_number_with_a_direction(metric_class: type[Metric]) -> None:
    result = scores(statistics(metric_class.name, images(2)), reference(metric_class))
    assert np.isfinite(result.values[metric_class.name])
    assert all(spread >= 0 for spread in result.spread.values())
    assert metric_class.better in ("min", "max")


def test_neither_order_nor_split_of_the_images_matters(metric_class: type[Metric]) -> None:
    real, name = reference(metric_class), metric_class.name
    expected = value(metric_class, statistics(name, images(2)), real)
    for parts, batch in ((1, 7), (3, 50)):
        found = value(metric_class, statistics(name, images(2), parts, batch), real)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_it_is_the_same_of_statistics_that_were_kept(metric_class: type[Metric], tmp_path: Path) -> None:
    """States are plain arrays, which are read without unpickling code."""
    real, taken = reference(metric_class), statistics(metric_class.name, images(2))
    expected = value(metric_class, taken, real)
    file = io.BytesIO()
    np.savez(file, **taken.state())  # type: ignore[arg-type]
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        kept = ScoreStatistics.from_state(dict(state))
    if real is not None:
        real.save(tmp_path / "real.npz")
        real = Reference.load(tmp_path / "real.npz")
    assert value(metric_class, kept, real) == pytest.approx(expected, rel=1e-12)


def test_images_like_the_real_ones_are_better_than_others(metric_class: type[Metric]) -> None:
    if not metric_class.compares:
        pytest.skip("it compares with no images")
    real, name = reference(metric_class), metric_class.name
    alike, others = (value(metric_class, statistics(name, images(2, shift)), real) for shift in (0.0, 5.0))
    assert alike < others if metric_class.better == "min" else alike > others


def test_scoring_changes_no_statistics(metric_class: type[Metric]) -> None:
    real, taken = reference(metric_class), statistics(metric_class.name, images(2))
    assert value(metric_class, taken, real) == value(metric_class, taken, real)
