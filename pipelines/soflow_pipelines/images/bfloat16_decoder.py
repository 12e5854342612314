"""An autoencoder that decodes in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from soflow_pipelines.images.codec import Autoencoder, ChannelsLastDecoder


class Bfloat16Autoencoder:
    """An autoencoder of any kind that decodes under bfloat16 autocast, on the device that it was opened on. It encodes as before."""

    def __init__(self, autoencoder: Autoencoder, device: torch.device) -> None:
        self._autoencoder, self._device = autoencoder, device
        self.facts = autoencoder.facts

    def encode(self, images: Tensor) -> Tensor:
        """[-1, 1] (B, 3, H, W) -> (B, 2C, h, w): posterior mean, then standard deviation, unscaled."""
        return self._autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> [-1, 1] (B, 3, H, W) float32."""
        with torch.autocast(self._device.type, dtype=torch.bfloat16):
            return self._autoencoder.decode(latents).float()


def in_bfloat16(autoencoder: Autoencoder, device: str | torch.device) -> Autoencoder:
    """The autoencoder, opened on this device, decoding in bfloat16, in channels-last memory where it has that.

    Its own `decode` is not to be used any more: the weights may lie in memory otherwise than before, which changes its rounding.
    """
    if isinstance(autoencoder, ChannelsLastDecoder):
        autoencoder.decode_channels_last()
    return Bfloat16Autoencoder(autoencoder, torch.device(device))
