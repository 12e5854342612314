"""Decodes samples of a network to images."""

from __future__ import annotations

import torch
from torch import Tensor

from soflow_pipelines.images.autoencoder import AutoencoderFacts
from soflow_pipelines.images.codec import Decoder
from soflow_pipelines.images.convert import to_uint8

DECODED_AT_ONCE = 8
"""Latents decoded in one call: the activations of a decoder are large."""


def autoencoder_tag(facts: AutoencoderFacts) -> str:
    """Name and digest of an autoencoder, for tags."""
    return f"{facts.id} ({facts.digest})"


def decode_samples(samples: Tensor, decoder: Decoder | None) -> Tensor:
    """Samples (B, C, H, W) of a network -> images (B, C', H', W') in [-1, 1]; as they are without a decoder."""
    if decoder is None:
        return samples
    return torch.cat([decoder.decode(part) for part in samples.split(DECODED_AT_ONCE)])


def viewable(samples: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1], or latents -> uint8 images; of latents, their first three channels."""
    if samples.shape[1] not in (1, 3):
        samples = (samples[:, :3] / 3).clamp(-1, 1)
    return to_uint8(samples)
