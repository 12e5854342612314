"""Generates samples and images from a weights file: network, sampler and decoder in one object.

Sample i is a function of (weights, seed, i, label i, sampler, steps, execution): the noise comes from (seed, i), and every pass of
the network and of the decoder has the same batch size, the last one filled up, so that neighbours cannot change the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.networks import NetworkModule
from soflow_core.objectives import Objective
from soflow_core.sampling_networks import SamplingNetwork
from soflow_core.weights import Weights, WeightsError, build_network, load_weights
from soflow_pipelines.images.codec import Autoencoder
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.images.encode import encode_png
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.config.sampling_settings import with_sampling
from soflow_platform.errors import UserError
from soflow_platform.generation.decoding import decode_samples, open_sample_decoder, require_finite
from soflow_platform.generation.execution import Execution
from soflow_platform.generation.sampling import generate

BATCH = 64
"""Samples in one forward pass; a multiple of it are read at a time by a statistics job."""


def read_weights(path: str | Path) -> tuple[Weights, Objective]:
    """Weights that this platform saved, and the method they were trained with. Raises UserError for another file."""
    try:
        weights = load_weights(path)
    except WeightsError as error:
        raise UserError(f"{path} does not hold a generator: {error}.") from None
    if weights.objective is None:
        raise UserError(f"{path} does not say which method it was trained with; it cannot be sampled.")
    return weights, weights.objective


@dataclass(frozen=True)
class Generator:
    """A network, the method that samples it, and the decoder of its samples."""

    network: NetworkModule
    objective: Objective
    info: DatasetInfo | None
    """Description of the training data; None where the weights name none."""
    decoder: Autoencoder | None = None
    """Decodes samples to images; None for a network of pixels, and where latents are not to be decoded."""
    execution: Execution = field(default_factory=Execution)
    """How the network is run; `decoder` is one that is run so already."""

    @classmethod
    def open(
        cls,
        path: str | Path,
        sampling: Mapping[str, Any] | None = None,
        autoencoder: str | None = None,
        decode: bool = True,
        execution: Execution | None = None,
    ) -> Generator:
        """Read weights that this platform saved, and with `decode` the autoencoder of the latents that they were trained on.

        `sampling` replaces sampler settings of the training, `autoencoder` (a folder or an id) the autoencoder that the weights
        name. `execution` is how both are run, in float32 by default. Raises InputError for a file that is not such weights, settings
        that the method does not have, an execution that this machine has no device for, and AutoencoderError for latents whose
        autoencoder cannot be loaded, or an autoencoder that did not make them.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        execution = execution or Execution()
        execution.require_device(device)
        weights, objective = read_weights(path)
        objective = with_sampling(objective, sampling or {})
        try:
            network = build_network(weights)
        except WeightsError as error:
            raise UserError(f"{path} does not hold a generator: {error}.") from None
        info = DatasetInfo.from_facts(weights.data)
        decoder = open_sample_decoder(network.config, info, autoencoder, device) if decode else None
        if decoder is not None:
            decoder = execution.run_decoder(decoder, device)
        return cls(network.to(device), objective, info, decoder, execution)

    @property
    def classes(self) -> int | None:
        """Number of classes; None for an unconditional network."""
        return self.network.config.classes

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    @cached_property
    def _run_network(self) -> SamplingNetwork:
        """The network as it is run; what is compiled and recorded lasts as long as the generator."""
        return self.execution.run_network(self.network)

    def samples(
        self, indices: Sequence[int] | Tensor, labels: Sequence[int] | Tensor | None, seed: int, steps: int
    ) -> Iterator[Tensor]:
        """Samples (B, C, H, W) float32 in the training space, on the CPU, at most BATCH at a time, in order.

        Raises UserError for labels the network does not know, and where a sample is not finite.
        """
        numbers = torch.as_tensor(indices, dtype=torch.int64)
        checked = self._checked_labels(labels, len(numbers))
        for start in range(0, len(numbers), BATCH):
            part = numbers[start : start + BATCH]
            part_labels = None if checked is None else checked[start : start + BATCH]
            fill = BATCH - len(part)
            full = torch.cat([part, part[-1:].expand(fill)])
            full_labels = (
                None if part_labels is None else torch.cat([part_labels, part_labels[-1:].expand(fill)])
            )
            samples = generate(self._run_network, self.objective, seed, full, full_labels, steps, self.device)
            yield require_finite(samples[: len(part)], part)

    def decoded(
        self, indices: Sequence[int] | Tensor, labels: Sequence[int] | Tensor | None, seed: int, steps: int
    ) -> Iterator[Tensor]:
        """Images (B, C, H, W) float32 in [-1, 1], at most BATCH at a time, in order; without a decoder the samples."""
        for samples in self.samples(indices, labels, seed, steps):
            yield require_finite(decode_samples(samples, self.decoder))

    def images(
        self, indices: Sequence[int] | Tensor, labels: Sequence[int] | Tensor | None, seed: int, steps: int
    ) -> Iterator[Tensor]:
        """Images (B, C, H, W) uint8, at most BATCH at a time, in order."""
        for decoded in self.decoded(indices, labels, seed, steps):
            yield to_uint8(decoded)

    def png(self, labels: Sequence[int], seed: int, steps: int) -> list[bytes]:
        """One PNG for each label; image i has the i-th noise of the seed."""
        known = labels if self.classes is not None else None
        batches = self.images(range(len(labels)), known, seed, steps)
        return [encode_png(image.permute(1, 2, 0).numpy()) for batch in batches for image in batch]

    def _checked_labels(self, labels: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
        if self.classes is None:
            return None
        if labels is None or len(labels) != count:
            raise UserError(
                f"this network is conditional: give a label from 0 to {self.classes - 1} for each image."
            )
        known = torch.as_tensor(labels, dtype=torch.int64)
        wrong = known[(known < 0) | (known >= self.classes)]
        if len(wrong):
            raise UserError(
                f"label {int(wrong[0])} is not one of the network's {self.classes} classes (0 to {self.classes - 1})."
            )
        return known
