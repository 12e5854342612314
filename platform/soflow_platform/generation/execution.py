"""How network and decoder are run when images are generated: in which precision, compiled, recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from soflow_core.networks import NetworkModule
from soflow_core.sampling_networks import Bfloat16Network, RecordedNetwork, SamplingNetwork
from soflow_core.sharding import compile_blocks
from soflow_pipelines.images.bfloat16_decoder import in_bfloat16
from soflow_pipelines.images.codec import Autoencoder
from soflow_platform.errors import UserError


@dataclass(frozen=True)
class Execution:
    """How passes of network and decoder are run. Each setting may change the last bits of an image."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the passes; the sampler's own arithmetic, and samples, are float32."""
    compile: bool = False
    """Whether the network is compiled, for the one batch size that it is sampled with."""
    graphs: bool = False
    """Whether the network's pass is recorded as a CUDA graph and replayed."""

    def require_device(self, device: torch.device) -> None:
        """Raises UserError where the device cannot run passes so."""
        if self.graphs and device.type != "cuda":
            raise UserError(
                "--graphs records passes of a network on a GPU, and this machine has none: leave it out."
            )

    def run_network(self, network: NetworkModule) -> SamplingNetwork:
        """The network as it is run; with `compile` its blocks are compiled in place."""
        run: SamplingNetwork = network
        if self.compile:
            compile_blocks(network)
        if self.precision == "bfloat16":
            run = Bfloat16Network(run)
        return RecordedNetwork(run) if self.graphs else run

    def run_decoder(self, decoder: Autoencoder, device: torch.device) -> Autoencoder:
        """The decoder as it is run."""
        return in_bfloat16(decoder, device) if self.precision == "bfloat16" else decoder
