"""Opens the autoencoder that decodes the latents of a shard set."""

from __future__ import annotations

import torch

from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.codec import Autoencoder, AutoencoderError
from soflow_pipelines.shards.info import DatasetInfo


def open_decoder(
    info: DatasetInfo | None,
    autoencoder: str | None,
    device: str | torch.device,
    download: bool = True,
) -> Autoencoder | None:
    """The autoencoder that the latents described by `info` were made with; None for pixels and for unknown data.

    `autoencoder` is a folder or an id to load in place of the id in `info`; `download` as in `load_autoencoder`. Raises
    AutoencoderError where it cannot be loaded or is not the one that made the latents.
    """
    if info is None or info.kind != "latents":
        return None
    try:
        decoder = load_autoencoder(autoencoder or str(info.autoencoder), device, download)
    except AutoencoderError as error:
        raise AutoencoderError(
            f"{error} Name its folder with --autoencoder, or as evaluation.autoencoder in a sweep file."
        ) from error
    if decoder.facts.digest != info.autoencoder_digest:
        raise AutoencoderError(
            f"the latents are of {info.autoencoder} ({info.autoencoder_digest}), the autoencoder named is "
            f"{decoder.facts.id} ({decoder.facts.digest}): name the one that made them."
        )
    return decoder
