"""Interface of a feature network, and what its implementations share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from soflow_core.failures import InputError
from soflow_core.kernels import tf32


class FeatureError(InputError):
    """A feature network that cannot be opened. The text names it and says what to do."""


@dataclass(frozen=True)
class Features:
    """Output of a feature network for a batch."""

    features: Tensor
    """(B, D) float32"""
    logits: Tensor | None = None
    """(B, K) where the network classifies."""
    spatial: Tensor | None = None
    """(B, S), an early layer that keeps the layout, for sFID."""


class FeatureNetwork(Protocol):
    """Images (B, C, H, W) -> Features, on the network's own device.

    `space` is its input: `images` in uint8, or samples in the `training` space itself (pixels in [-1, 1] or latents).

    Distances are comparable where `id` is the same: it names the network, the version of what is done to an image before and
    after it, and its weights. `warnings` are sentences that accompany every score on it.
    """

    id: str
    dim: int
    """Width D of the features."""
    metrics: frozenset[str]
    """Metrics that can be taken on it."""
    warnings: tuple[str, ...]
    space: Literal["images", "training"]

    def __call__(self, images: Tensor) -> Features: ...


@runtime_checkable
class PatchFeatureNetwork(Protocol):
    """A feature network that also gives features of the parts of an image."""

    def patch_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, D, h, w) float32, with the D of its features."""
        ...


REASON_CHARACTERS = 160


def reason(error: BaseException) -> str:
    """The message of a library's error, cut to what fits a sentence: torch lists every key of a state."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else f"{text[:REASON_CHARACTERS]} ..."


DISTANCES = frozenset({"fd", "kid", "precision", "recall"})
"""Metrics that can be taken on any features."""


def as_rgb(images: Tensor, name: str) -> Tensor:
    """uint8 (B, 1 or 3, H, W) -> (B, 3, H, W), grey repeated. Raises ValueError for anything else."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        raise ValueError(f"{name} takes uint8 (B, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
    return images.expand(-1, 3, -1, -1)


def normalized(images: Tensor, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, side, side), resized as TensorFlow 1 does; `mean` and `std` are of pixels in [0, 1]."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    resized = interpolate_bilinear_2d_like_tensorflow1x(
        images.float(), size=(side, side), align_corners=False
    )
    centre = torch.tensor(mean, device=images.device).mul(255)[:, None, None]
    scale = torch.tensor(std, device=images.device).mul(255)[:, None, None]
    return (resized - centre) / scale


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No TF32, no autocast, no choice of kernels that differs from run to run: features are float32 on every machine."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        with tf32(False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before
