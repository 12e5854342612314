"""Interfaces of an autoencoder, the facts that identify one, and the kinds that can be opened by name; without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from soflow_core.failures import InputError
from soflow_core.registration import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AutoencoderError(InputError):
    """An autoencoder that cannot be loaded. The text names it and says what to do."""


@dataclass(frozen=True)
class AutoencoderFacts:
    """Identity and scaling of an autoencoder: all that its latents depend on."""

    id: str
    """What opens it again: the hub's id, or the folder's name; behind `KIND:` where the kind is not `kl`."""
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


class Autoencoder(Encoder, Decoder, Protocol):
    """Images to latents and back, on the device that it was opened on. Rows of a batch are independent."""

    facts: AutoencoderFacts


@runtime_checkable
class ChannelsLastDecoder(Protocol):
    """What an autoencoder of convolutions may have beside the rest: its decoder in channels-last memory.

    Convolutions in bfloat16 read such memory as it is. An autoencoder without it is decoded in the memory that it has.
    """

    def decode_channels_last(self) -> None:
        """Lays the decoder's weights out in channels-last memory. Encoding does not change."""


class AutoencoderKind(ABC):
    """A kind of autoencoder, opened by `NAME:PLACE`; a place alone is one of `kl`. A frozen dataclass without settings."""

    name: str
    """Given by `@register`."""

    @classmethod
    def example(cls, folder: Path) -> str | None:
        """The place of a small autoencoder of this kind, which it may write into a folder; None where there is none.

        The conformance suite opens it.
        """
        del folder
        return None

    @abstractmethod
    def open(self, place: str, device: torch.device, download: bool) -> Autoencoder:
        """The autoencoder at a place, in float32 on the device; without `download` nothing is fetched.

        Raises AutoencoderError where it cannot be loaded.
        """


AUTOENCODERS: Registry[AutoencoderKind] = Registry("autoencoder", AutoencoderKind, "name", default="kl")  # type: ignore[type-abstract]


def named_kind(text: str) -> tuple[str, str]:
    """The registered kind of what names an autoencoder, and the place behind its colon; `kl` for a place alone."""
    name, colon, place = text.partition(":")
    if colon and not place.startswith("//") and name in AUTOENCODERS:
        return name, place
    return str(AUTOENCODERS.default), text
