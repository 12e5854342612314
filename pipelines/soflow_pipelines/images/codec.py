"""Interfaces of an autoencoder, and the facts that identify one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AutoencoderFacts:
    """Identity and scaling of an autoencoder: all that its latents depend on."""

    id: str
    """The hub's id, or the folder's name."""
    digest: str
    """Digest of the weights."""
    channels: int
    """Channels of a latent."""
    factor: int
    """Sides of an image are this many times those of its latent."""
    scaling: float
    shift: float


class Encoder(Protocol):
    """Images to latents."""

    def encode(self, images: Tensor) -> Tensor:
        """[-1, 1] (B, 3, H, W) -> (B, 2C, h, w): posterior mean, then standard deviation, unscaled."""


class Decoder(Protocol):
    """Latents to images."""

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> [-1, 1] (B, 3, H, W)."""
