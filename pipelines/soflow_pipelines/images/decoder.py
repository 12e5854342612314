"""soflow_pipelines.images.decoder"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Decoder(Protocol):
    """Latents as the network sees them to images in [-1, 1]; an autoencoder."""

    def decode(self, latents: Tensor) -> Tensor: ...
