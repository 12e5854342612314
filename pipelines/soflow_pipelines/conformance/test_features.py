"""The contract of a feature network, for every registered one that needs no weight file, or those of `--features`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_pipelines.features.network import FeatureError, FeatureNetwork
from soflow_pipelines.features.registry import FeatureKind, OpeningOptions
from soflow_pipelines.metrics import METRICS

SHAPE, ROWS = (1, 8, 8), 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def network(features_class: type[FeatureKind], cache: Path) -> FeatureNetwork:
    options = OpeningOptions(cache, torch.device("cpu"), download=False, shape=SHAPE)
    try:
        return features_class().open(options)
    except FeatureError as error:
        pytest.skip(f"it is not here: {error}")


def batch(network: FeatureNetwork, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if network.space == "images":
        return torch.randint(256, (ROWS, *SHAPE), generator=generator, dtype=torch.uint8)
    return torch.rand(ROWS, *SHAPE, generator=generator) * 2 - 1


def test_it_says_what_it_is(features_class: type[FeatureKind], network: FeatureNetwork) -> None:
    assert network.id, "the network, its version and its weights"
    assert network.space == features_class.space
    assert network.metrics <= set(METRICS)
    assert all(warning.endswith(".") for warning in network.warnings)


def test_features_are_float32_rows_of_its_width(network: FeatureNetwork) -> None:
    found = network(batch(network)).features
    assert found.shape == (ROWS, network.dim)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert not found.requires_grad


def test_rows_are_independent_and_nothing_is_drawn(network: FeatureNetwork) -> None:
    images, before = batch(network), torch.get_rng_state()
    together = network(images).features
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(network(images).features, together)
    assert_close(network(images[2:4]).features, together[2:4], rtol=1e-4, atol=1e-5)


def test_images_that_differ_have_features_that_differ(network: FeatureNetwork) -> None:
    assert not torch.allclose(network(batch(network)).features, network(batch(network, 1)).features)
