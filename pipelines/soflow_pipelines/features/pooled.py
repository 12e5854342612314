"""Features without weights: block averages of samples in the training space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.nn import functional

from soflow_pipelines.features.network import DISTANCES, Features

SIDE = 8
"""Blocks along each side, at most."""


class PooledFeatures:
    """(B, C, H, W) pixels in [-1, 1] or latents -> (B, C * h * w) averages over blocks, h and w at most 8.

    A Fréchet distance on them sees layout and colour, not texture: it compares trials of one sweep on data for which no feature
    network is at hand, and is no FID.
    """

    metrics = DISTANCES
    warnings: tuple[str, ...] = ()
    space: Literal["images", "training"] = "training"

    def __init__(self, shape: Sequence[int]) -> None:
        channels, height, width = shape
        self._blocks = min(height, SIDE), min(width, SIDE)
        self.dim = channels * self._blocks[0] * self._blocks[1]
        self.id = f"pooled-{channels}x{self._blocks[0]}x{self._blocks[1]}-1"

    def __call__(self, images: Tensor) -> Features:
        if not images.dtype.is_floating_point:
            raise ValueError(
                f"pooled features are of samples in the training space, not of {images.dtype} images"
            )
        return Features(functional.adaptive_avg_pool2d(images.float(), self._blocks).flatten(1))
