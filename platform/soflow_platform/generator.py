"""Images from a registered or saved network.

Sample i is a function of (weights, seed, i, label i, steps): the noise comes from (seed, i), and every forward pass has the same
batch size, the last one filled up, so that neighbours cannot change the rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_core.checkpoints import build_network, load_weights
from soflow_core.networks import DiT
from soflow_core.objectives import Objective
from soflow_pipelines.writers import encode_png
from soflow_platform.errors import UserError
from soflow_platform.evaluation import generate, viewable

BATCH = 64


@dataclass(frozen=True)
class Generator:
    """A network with the method that samples it."""

    network: DiT
    objective: Objective
    data: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Generator:
        """Read weights that this platform saved. Raises UserError for a file that is not such weights."""
        try:
            weights = load_weights(path)
            network = build_network(weights)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} does not hold a generator: {error}.") from None
        if weights.objective is None:
            raise UserError(f"{path} does not say which method it was trained with; it cannot be sampled.")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(network.to(device), weights.objective, weights.data)

    @property
    def classes(self) -> int | None:
        """Number of classes; None for an unconditional network."""
        return self.network.config.classes

    def batches(
        self, indices: Sequence[int], labels: Sequence[int] | None, seed: int, steps: int
    ) -> Iterator[Tensor]:
        """Images (B, C, H, W) uint8 for sample indices and their labels, at most BATCH at a time, in order.

        Raises UserError for labels the network does not know.
        """
        wanted = self._known(labels, len(indices))
        device = next(self.network.parameters()).device
        for start in range(0, len(indices), BATCH):
            part = torch.tensor(list(indices[start : start + BATCH]))
            own = None if wanted is None else wanted[start : start + BATCH]
            fill = BATCH - len(part)
            full = torch.cat([part, part[-1:].expand(fill)])
            filled = None if own is None else torch.cat([own, own[-1:].expand(fill)])
            samples = generate(self.network, self.objective, seed, full, filled, steps, device)
            yield viewable(samples[: len(part)])

    def png(self, labels: Sequence[int], seed: int, steps: int) -> list[bytes]:
        """One PNG for each label; image i has the i-th noise of the seed."""
        known = labels if self.classes is not None else None
        batches = self.batches(range(len(labels)), known, seed, steps)
        return [encode_png(image.permute(1, 2, 0).numpy()) for batch in batches for image in batch]

    def _known(self, labels: Sequence[int] | None, count: int) -> Tensor | None:
        if self.classes is None:
            return None
        if labels is None or len(labels) != count:
            raise UserError(
                f"this network is conditional: give a label from 0 to {self.classes - 1} for each image."
            )
        wrong = [label for label in labels if not 0 <= label < self.classes]
        if wrong:
            raise UserError(
                f"label {wrong[0]} is not one of the network's {self.classes} classes (0 to {self.classes - 1})."
            )
        return torch.tensor(list(labels))
