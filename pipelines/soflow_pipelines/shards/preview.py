"""A few images of a shard set, decoded where it holds latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.images.codec import Decoder
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import read_info

DECODED_AT_ONCE = 8
"""Latents decoded in one call: the activations of a decoder are large."""


def sample_images(
    uri: str | Path, count: int, seed: int = 0, decoder: Decoder | None = None
) -> tuple[NDArray[np.uint8], Tensor | None]:
    """Images uint8 (N, 1 or 3, H, W) and labels (N,) of `count` samples, or of all where there are fewer.

    Latents are decoded from their posterior means. Raises ValueError where they have no decoder.
    """
    info = read_info(uri)
    if info.kind == "latents" and decoder is None:
        raise ValueError("latents need an autoencoder to be seen")
    with ShardLoader(uri, min(count, info.samples), seed=seed, threads=0, posterior="mean") as loader:
        batch = next(loader)
    if decoder is None:
        return to_uint8(batch.x0).numpy(), batch.labels
    images = [decoder.decode(part) for part in batch.x0.split(DECODED_AT_ONCE)]
    return to_uint8(torch.cat(images)).numpy(), batch.labels
