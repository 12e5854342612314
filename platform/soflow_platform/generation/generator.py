"""Samples and images from a registered or saved network.

Sample i is a function of (weights, seed, i, label i, sampler, steps): the noise comes from (seed, i), and every forward pass has the
same batch size, the last one filled up, so that neighbours cannot change the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.networks import DiT
from soflow_core.objectives import Objective
from soflow_core.weights import Weights, build_network, load_weights
from soflow_pipelines.images.encode import encode_png
from soflow_platform.errors import UserError
from soflow_platform.generation.decoding import viewable
from soflow_platform.generation.sampling import generate, with_sampling

BATCH = 64


def read_weights(path: str | Path) -> tuple[Weights, Objective]:
    """Weights that this platform saved, and the method they were trained with. Raises UserError for another file."""
    try:
        weights = load_weights(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not hold a generator: {error}.") from None
    if weights.objective is None:
        raise UserError(f"{path} does not say which method it was trained with; it cannot be sampled.")
    return weights, weights.objective


@dataclass(frozen=True)
class Generator:
    """A network with the method that samples it."""

    network: DiT
    objective: Objective
    data: dict[str, Any]
    """What is known of the data it was trained on."""

    @classmethod
    def open(cls, path: str | Path, sampling: Mapping[str, Any] | None = None) -> Generator:
        """Read weights that this platform saved, to be sampled with other settings than those of training where `sampling` has some.

        Raises UserError for a file that is not such weights, or settings the method does not have.
        """
        weights, objective = read_weights(path)
        objective = with_sampling(objective, sampling or {})
        try:
            network = build_network(weights)
        except ValueError as error:
            raise UserError(f"{path} does not hold a generator: {error}.") from None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(network.to(device), objective, weights.data)

    @property
    def classes(self) -> int | None:
        """Number of classes; None for an unconditional network."""
        return self.network.config.classes

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def samples(
        self, indices: Sequence[int] | Tensor, labels: Sequence[int] | Tensor | None, seed: int, steps: int
    ) -> Iterator[Tensor]:
        """Samples (B, C, H, W) float32 in the training space, on the CPU, at most BATCH at a time, in order.

        Raises UserError for labels the network does not know.
        """
        numbers = torch.as_tensor(indices, dtype=torch.int64)
        wanted = self._known(labels, len(numbers))
        for start in range(0, len(numbers), BATCH):
            part = numbers[start : start + BATCH]
            own = None if wanted is None else wanted[start : start + BATCH]
            fill = BATCH - len(part)
            full = torch.cat([part, part[-1:].expand(fill)])
            filled = None if own is None else torch.cat([own, own[-1:].expand(fill)])
            made = generate(self.network, self.objective, seed, full, filled, steps, self.device)
            yield made[: len(part)]

    def batches(
        self, indices: Sequence[int] | Tensor, labels: Sequence[int] | Tensor | None, seed: int, steps: int
    ) -> Iterator[Tensor]:
        """Images (B, C, H, W) uint8, at most BATCH at a time, in order; of latents, their first three channels."""
        for made in self.samples(indices, labels, seed, steps):
            yield viewable(made)

    def png(self, labels: Sequence[int], seed: int, steps: int) -> list[bytes]:
        """One PNG for each label; image i has the i-th noise of the seed."""
        known = labels if self.classes is not None else None
        batches = self.batches(range(len(labels)), known, seed, steps)
        return [encode_png(image.permute(1, 2, 0).numpy()) for batch in batches for image in batch]

    def _known(self, labels: Sequence[int] | Tensor | None, count: int) -> Tensor | None:
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
