"""Images per second of sampling in 1, 2 and 50 steps, with and without decoding, compiled and with the network's pass recorded, and of
decoding in each precision: a section of benchmarks/gpu.sh.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gpu_steps import TINY, network_of
from measurements import Results
from sd_decoder import Decoder
from soflow_core.kernels import tf32
from soflow_core.networks import DiT
from soflow_core.objectives import FlowMatching, Objective, SoFlow
from soflow_core.sampling_networks import Bfloat16Network, RecordedNetwork, SamplingNetwork
from soflow_core.sharding import compile_blocks

if TYPE_CHECKING:
    from gpu_suite import Options

WAYS: tuple[tuple[int, Objective], ...] = ((1, SoFlow()), (2, SoFlow()), (50, FlowMatching()))
"""Consistency sampling in one or two steps, the solver of the velocity in many."""
DECODED_AT_ONCE = 16
COMPILING = 90
"""Seconds that are left to the sections after this one where a network is compiled."""


@dataclass(frozen=True)
class Sampled:
    """A network with what it is sampled from, and a decoder."""

    network: SamplingNetwork
    decoder: nn.Module
    noise: Tensor
    labels: Tensor

    @torch.no_grad()
    def rate(self, steps: int, objective: Objective, decoded: bool) -> float:
        """Images per second."""
        started = time.perf_counter()
        renoise = [torch.randn_like(self.noise) for _ in range(steps - 1)]
        made = objective.sample(self.network, self.noise, self.labels, steps, renoise)
        if decoded:
            made = decode(self.decoder, made, self.noise.device.type == "cuda")
        # Reading a number waits for the device.
        made.float().sum().item()
        return len(self.noise) / (time.perf_counter() - started)


def decode(decoder: nn.Module, latents: Tensor, bfloat16: bool) -> Tensor:
    """Latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w), a few at a time."""
    with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        return torch.cat([decoder(part) for part in latents.split(DECODED_AT_ONCE)])


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
            noise, labels = torch.randn(rows, *shape), torch.arange(rows) % 1000
        for execution, run in executions(network, options):
            sampled = Sampled(run, decoder, noise, labels)
            for steps, objective in WAYS:
                # Decoding is the same in each of them.
                for decoded in (False, True) if not execution else (False,):
                    sampled.rate(steps, objective, decoded)
                    rates = [sampled.rate(steps, objective, decoded) for _ in range(rounds)]
                    what = f"{size}, {steps} step(s){execution}{', decoded' if decoded else ''}"
                    rate = results.add("sampling", what, rates, "images/s", "higher")
                    print(f"sampling {what}: {rate:,.1f} images/s", flush=True)
    with device:
        latents = torch.randn(rows, *shape)
    decoding(results, decoder, latents, rounds)


def executions(network: DiT, options: Options) -> Iterator[tuple[str, SamplingNetwork]]:
    """What the network is run as, one after the other, and how its rows are called. It is compiled in place for the last ones."""
    run: SamplingNetwork = network
    if options.device.type != "cuda":
        yield "", run
        print("sampling: no rows with graphs, which record the work of a GPU, and none compiled", flush=True)
        return
    run = Bfloat16Network(network)
    yield "", run
    yield ", graphs", RecordedNetwork(run)
    if options.left < COMPILING:
        print("sampling: no rows compiled, for no time was left", flush=True)
        return
    compile_blocks(network)
    yield ", compiled", run
    yield ", compiled, graphs", RecordedNetwork(run)


@torch.no_grad()
def decoding(results: Results, decoder: nn.Module, latents: Tensor, rounds: int) -> None:
    """Add images per second of the decoder in each precision, bfloat16 in both orders of memory. It is channels-last afterwards."""
    for what, bfloat16 in (("float32", False), ("bfloat16", True), ("bfloat16, channels-last", True)):
        if what.endswith("channels-last"):
            decoder.to(memory_format=torch.channels_last)
        rates = []
        for _ in range(rounds + 1):
            started = time.perf_counter()
            # As `soflowctl generate` decodes in float32.
            with tf32(False):
                decode(decoder, latents, bfloat16).float().sum().item()
            rates.append(len(latents) / (time.perf_counter() - started))
        rate = results.add("decoding", what, rates[1:], "images/s", "higher")
        print(f"decoding in {what}: {rate:,.1f} images/s", flush=True)
