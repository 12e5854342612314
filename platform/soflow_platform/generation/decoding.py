"""soflow_platform.generation.decoding"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from soflow_pipelines.images.autoencoder import (
    AutoencoderError,
    AutoencoderFacts,
    KlAutoencoder,
    load_autoencoder,
)
from soflow_pipelines.images.convert import to_uint8
from soflow_platform.errors import UserError

DECODED_AT_ONCE = 8
"""Latents decoded in one call: the activations of a decoder are large."""


def open_decoder(
    data: Mapping[str, Any], autoencoder: str | None, device: str | torch.device
) -> KlAutoencoder | None:
    """What turns samples into images: nothing for pixels, for latents the autoencoder they were made with.

    `data` is what is known of the training data; `autoencoder` a folder or an id to use in place of its own. Raises UserError where
    there is none or it is another.
    """
    if data.get("kind") != "latents":
        return None
    name = autoencoder or data.get("autoencoder")
    try:
        decoder = load_autoencoder(str(name), device)
    except AutoencoderError as error:
        raise UserError(f"{error} Name its folder as the autoencoder.") from error
    if decoder.facts.digest != data.get("autoencoder_digest"):
        raise UserError(
            f"the latents are of {data.get('autoencoder')} ({data.get('autoencoder_digest')}), the autoencoder named is "
            f"{decoder.facts.id} ({decoder.facts.digest}): name the one that made them."
        )
    return decoder


def autoencoder_tag(facts: AutoencoderFacts) -> str:
    """An autoencoder as the tags of a number name it."""
    return f"{facts.id} ({facts.digest})"


def decoded(samples: Tensor, decoder: KlAutoencoder | None) -> Tensor:
    """Samples (B, C, H, W) as the network makes them -> images in [-1, 1] (B, C', H', W')."""
    if decoder is None:
        return samples
    return torch.cat([decoder.decode(part) for part in samples.split(DECODED_AT_ONCE)])


def viewable(samples: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1], or latents -> uint8 images; of latents, their first three channels."""
    if samples.shape[1] not in (1, 3):
        samples = (samples[:, :3] / 3).clamp(-1, 1)
    return to_uint8(samples)
