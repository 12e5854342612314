"""Small networks with random weights, and batches for them, in float64 or float32."""

from dataclasses import replace

import torch

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Batch, Draws, Objective, SoFlow
from soflow_core.times import consistency_times

SHAPE = (2, 4, 4)
CONFIG = DiTConfig(
    channels=2, height=4, width=4, patch=2, hidden=16, depth=2, heads=2, classes=3, null_label=True
)


def random_network(dtype: torch.dtype = torch.float64, seed: int = 0) -> DiT:
    generator = torch.Generator().manual_seed(seed)
    network = DiT(CONFIG).to(dtype)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.copy_(0.25 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return network


def random_inputs(
    objective: Objective,
    size: int = 12,
    dtype: torch.dtype = torch.float64,
    conditional: bool = True,
    seed: int = 0,
) -> tuple[Batch, Draws]:
    generator = torch.Generator().manual_seed(seed)
    draws = objective.draw(generator, size, SHAPE, conditional)
    x0 = torch.randn(size, *SHAPE, generator=generator, dtype=dtype)
    labels = torch.randint(3, (size,), generator=generator) if conditional else None
    t, s, first = draws.t.to(dtype), draws.s.to(dtype), draws.velocity_rows
    if isinstance(objective, SoFlow):
        # The clamp of s below t is exact in float32; keep it exact in the wider type.
        s[first:] = consistency_times(t[first:], s[first:])[1]
    return Batch(x0, labels), replace(draws, noise=draws.noise.to(dtype), t=t, s=s)


def gradient(loss: torch.Tensor, network: DiT) -> torch.Tensor:
    """All parameters' gradients in one vector."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
