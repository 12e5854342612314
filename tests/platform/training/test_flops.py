"""What a plan says of a network agrees with the network that is built."""

from __future__ import annotations

import pytest

from soflow_core.networks import DiTConfig

NETWORKS = [
    DiTConfig(1, 8, 8, patch=2, hidden=96, depth=4, heads=4, classes=10, null_label=True),
    DiTConfig(1, 8, 8, patch=2, hidden=32, depth=1, heads=2, classes=10),
    DiTConfig(1, 8, 8, patch=2, hidden=32, depth=1, heads=2, classes=10, guidance_scale=True),
    DiTConfig(4, 32, 16, patch=4, hidden=48, depth=3, heads=3, mlp_ratio=2.7),
]


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_are_counted_without_building_the_network(network: DiTConfig) -> None:
    assert network.parameters() == sum(p.numel() for p in network.build().parameters())
