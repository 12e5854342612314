"""Decodes samples of a network to images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from soflow_core.networks import Architecture
from soflow_pipelines.images.autoencoder import KlAutoencoder, load_autoencoder
from soflow_pipelines.images.codec import Autoencoder, AutoencoderError, AutoencoderFacts, Decoder
from soflow_pipelines.references.latent_decoder import open_decoder
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.errors import UserError

DECODED_AT_ONCE = 8
"""Latents decoded in one call: the activations of a decoder are large."""
IMAGE_CHANNELS = (1, 3)


def autoencoder_tag(facts: AutoencoderFacts) -> str:
    """Name and digest of an autoencoder, for tags."""
    return f"{facts.id} ({facts.digest})"


def open_sample_decoder(
    config: Architecture, info: DatasetInfo | None, autoencoder: str | None, device: str | torch.device
) -> Autoencoder | None:
    """The autoencoder that decodes the samples of a network; None for a network of pixels.

    `info` describes the training data; `autoencoder` is a folder or an id to load in place of the one that it names. Raises
    AutoencoderError where there is none, or another one than made the latents.
    """
    if info is None:
        return _decoder_of_unknown_data(config, autoencoder, device)
    try:
        return open_decoder(info, autoencoder, device)
    except AutoencoderError as error:
        if autoencoder is not None:
            raise
        raise AutoencoderError(
            f"this network makes latents of the autoencoder {info.autoencoder} (weights {info.autoencoder_digest}), which is not on "
            "this machine and cannot be fetched: name its folder with --autoencoder FOLDER, or take raw latents where the command "
            "has --latents."
        ) from error


def _decoder_of_unknown_data(
    config: Architecture, autoencoder: str | None, device: str | torch.device
) -> Autoencoder | None:
    if config.channels in IMAGE_CHANNELS and autoencoder is None:
        return None
    if autoencoder is None:
        raise AutoencoderError(
            f"this network makes samples of {config.channels} channels and its weights do not say which autoencoder decodes them: name "
            "its folder with --autoencoder FOLDER, or take raw latents where the command has --latents."
        )
    decoder = load_autoencoder(autoencoder, device)
    if decoder.facts.channels != config.channels:
        raise AutoencoderError(
            f"the autoencoder {decoder.facts.id} decodes latents of {decoder.facts.channels} channels, this network makes samples of "
            f"{config.channels}: name the one that made its training data."
        )
    return decoder


def kl_network(decoder: Autoencoder) -> Any:
    """diffusers' module of an autoencoder, for formats that hold one. Raises UserError for an autoencoder of another kind."""
    if not isinstance(decoder, KlAutoencoder):
        raise UserError(
            f"this format holds diffusers' AutoencoderKL, and the autoencoder {decoder.facts.id} is of another kind: take "
            "`--to safetensors`."
        )
    return decoder.network


def decode_samples(samples: Tensor, decoder: Decoder | None) -> Tensor:
    """Samples (B, C, H, W) of a network -> images (B, C', H', W') in [-1, 1]; as they are without a decoder.

    Every call of the decoder has the same batch size, the last one filled up, so that an image does not depend on its neighbours.
    """
    if decoder is None or not len(samples):
        return samples
    images = []
    for part in samples.split(DECODED_AT_ONCE):
        fill = part[-1:].expand(DECODED_AT_ONCE - len(part), -1, -1, -1)
        images.append(decoder.decode(torch.cat([part, fill]))[: len(part)])
    return torch.cat(images)


def require_finite(images: Tensor, numbers: Tensor | None = None) -> Tensor:
    """The same images (B, C, H, W). Raises UserError where one is not finite; it would be written as if it were black.

    `numbers` (B,) are their indices.
    """
    bad = (~torch.isfinite(images)).flatten(1).any(dim=1).nonzero().flatten()
    if len(bad):
        which = "an image" if numbers is None else f"image {int(numbers[int(bad[0])])}"
        raise UserError(
            f"{which} that these weights make is not finite: they are damaged, or their guidance scale is too large; take another "
            "checkpoint, or a smaller --guidance where the method has it."
        )
    return images
