"""Images per second of sampling in 1, 2 and 50 steps, with and without decoding: a section of benchmarks/gpu.sh."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gpu_steps import TINY, network_of
from measurements import Results
from sd_decoder import Decoder
from soflow_core.networks import DiT
from soflow_core.objectives import FlowMatching, Objective, SoFlow

if TYPE_CHECKING:
    from gpu_suite import Options

WAYS: tuple[tuple[int, Objective], ...] = ((1, SoFlow()), (2, SoFlow()), (50, FlowMatching()))
"""Consistency sampling in one or two steps, the solver of the velocity in many."""
DECODED_AT_ONCE = 16


@dataclass(frozen=True)
class Sampled:
    """A network with what it is sampled from, and a decoder."""

    network: nn.Module
    decoder: nn.Module
    noise: Tensor
    labels: Tensor

    @torch.no_grad()
    def rate(self, steps: int, objective: Objective, decoded: bool) -> float:
        """Images per second."""
        device = self.noise.device
        started = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            renoise = [torch.randn_like(self.noise) for _ in range(steps - 1)]
            made = objective.sample(self.network, self.noise, self.labels, steps, renoise)
            if decoded:
                made = torch.cat([self.decoder(part) for part in made.split(DECODED_AT_ONCE)])
        # Reading a number waits for the device.
        made.float().sum().item()
        return len(self.noise) / (time.perf_counter() - started)


def sampling(results: Results, options: Options) -> None:
    """B/2 and XL/2 in bfloat16, latents of 32 x 32, decoded to 256 x 256 by a network of the sizes of Stable Diffusion's."""
    device, small = options.device, options.small
    rows, rounds, shape = (2, 1, (4, 8, 8)) if small else (64, 3, (4, 32, 32))
    torch.manual_seed(0)
    with device:
        decoder = (Decoder(widths=(32, 32), blocks=1) if small else Decoder()).eval()
    for size in (TINY,) if small else ("B/2", "XL/2"):
        with device:
            network = DiT(network_of(size, *shape)).eval()
            sampled = Sampled(network, decoder, torch.randn(rows, *shape), torch.arange(rows) % 1000)
        for steps, objective in WAYS:
            for decoded in (False, True):
                sampled.rate(steps, objective, decoded)
                rates = [sampled.rate(steps, objective, decoded) for _ in range(rounds)]
                what = f"{size}, {steps} step(s){', decoded' if decoded else ''}"
                rate = results.add("sampling", what, rates, "images/s", "higher")
                print(f"sampling {what}: {rate:,.1f} images/s", flush=True)
