"""FLOPs of a forward pass, and of a second head in training."""

from __future__ import annotations

from soflow_core.networks import Architecture
from soflow_core.nfe import training_calls
from soflow_core.objectives import Objective


def forward_gmac(network: Architecture) -> float:
    """Multiply-accumulates of one forward pass of one sample, in 1e9."""
    return network.forward_flops() / 2e9


def second_head_flops(
    network: Architecture, objective: Objective, batch: int, conditional: bool = True
) -> float:
    """FLOPs of training on one sample that passes through both heads of a network have more than passes through one."""
    each = network.second_head_flops()
    if not each:
        return 0.0
    phases = training_calls(objective, batch, conditional)
    passes = sum(
        share * sum(call.evaluations for call in calls if call.head == "both") for share, calls in phases
    )
    return float(passes) * each / batch
