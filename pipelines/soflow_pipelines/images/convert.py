"""Conversion between uint8 pixels and the range [-1, 1] of networks."""

from __future__ import annotations

import torch
from torch import Tensor


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 (..., H, W) -> float32 of the same shape: 0 becomes -1, 255 becomes 1."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images are uint8, these are {images.dtype}")
    # A GPU multiplies with the rounded reciprocal of a plain number; a quotient by a tensor is the CPU's to the last bit.
    return images.to(torch.float32).div_(torch.full((), 127.5, device=images.device)).sub_(1.0)


def to_uint8(images: Tensor) -> Tensor:
    """float (..., H, W) in [-1, 1] -> uint8: clamp(127.5 x + 128, 0, 255) without its fraction."""
    return images.detach().to(torch.float32).mul(127.5).add_(128.0).clamp_(0.0, 255.0).to(torch.uint8)
