"""FLOPs of a forward pass."""

from __future__ import annotations

from soflow_core.networks import Architecture


def forward_gmac(network: Architecture) -> float:
    """Multiply-accumulates of one forward pass of one sample, in 1e9."""
    return network.forward_flops() / 2e9
