"""What a network says of images, and what is asked of such a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


class FeatureError(Exception):
    """A feature network that cannot be had. The text names it and the ways out."""


@dataclass(frozen=True)
class Features:
    """What a network says of a batch."""

    features: Tensor  # (B, D) float32
    logits: Tensor | None = None  # (B, K) where the network classifies
    spatial: Tensor | None = None  # (B, S): an early layer that keeps the layout, for sFID


class FeatureNetwork(Protocol):
    """Images (B, C, H, W) -> Features, on the network's own device.

    `space` says what it looks at: `images` in uint8, or samples in the `training` space itself (pixels in [-1, 1] or latents).

    Distances are comparable where `id` is the same: it names the network, the version of what is done to an image before and
    after it, and its weights. `warnings` are sentences that go with every number taken on it.
    """

    id: str
    dim: int  # D of the features
    metrics: frozenset[str]  # what can be measured on it
    warnings: tuple[str, ...]
    space: Literal["images", "training"]

    def __call__(self, images: Tensor) -> Features: ...


DISTANCES = frozenset({"fd", "kid", "precision", "recall"})
"""What can be measured on any features."""


def as_rgb(images: Tensor, name: str) -> Tensor:
    """uint8 (B, 1 or 3, H, W) -> (B, 3, H, W), grey repeated. ValueError for anything else."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype.is_floating_point:
        raise ValueError(f"{name} takes uint8 (B, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)
