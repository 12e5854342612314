"""Layers of the U-Net: resampling, positional embedding of a time, and the residual block.

Parameters have the names and shapes of EDM's SongUNet (arXiv 2206.00364), which the official CIFAR-10 checkpoints use.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    conv2d,
    conv_transpose2d,
    scaled_dot_product_attention,
    silu,
)

from soflow_core.networks.embeddings import MAX_PERIOD

GROUPS, LEAST_IN_GROUP = 32, 4
"""Groups of a norm, and the least channels in one of them."""
EPS = 1e-6
HALVED = math.sqrt(0.5)
"""Factor after each sum with a skip connection, which keeps the variance of two independent terms."""


def groups_of(channels: int) -> int:
    """Groups of the norm of so many channels."""
    return min(GROUPS, max(1, channels // LEAST_IN_GROUP))


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of so many channels, which its number of groups must divide."""
    return nn.GroupNorm(groups_of(channels), channels, eps=EPS)


class Resample(nn.Module):
    """Convolution (no kernel: none) after halving or doubling both sides with a fixed separable filter: (B, C, H, W) -> (B, D, H', W').

    The filter has an even number of taps. Doubling keeps a constant image, up to the border, as halving does.
    """

    resample_filter: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        direction: str | None = None,
        taps: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        self.direction, self.pad, self.filter_pad = direction, kernel // 2, (len(taps) - 1) // 2
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        line = torch.tensor(taps, dtype=torch.float32)
        square = torch.outer(line, line) / line.sum().square()
        self.register_buffer("resample_filter", square[None, None] if direction else None)
        nn.init.xavier_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.direction is not None:
            channels = x.shape[1]
            taps = self.resample_filter.to(x.dtype).expand(channels, 1, -1, -1)
            if self.direction == "up":
                x = conv_transpose2d(x, 4 * taps, stride=2, padding=self.filter_pad, groups=channels)
            else:
                x = conv2d(x, taps, stride=2, padding=self.filter_pad, groups=channels)
        return conv2d(x, self.weight, self.bias, padding=self.pad)


class Positional(nn.Module):
    """Sines, then cosines, of a time at frequencies from 1 to 1 / MAX_PERIOD, both included: (B,) -> (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        precise = torch.promote_types(t.dtype, torch.float32)
        exponents = torch.arange(half, dtype=precise, device=t.device) / (half - 1)
        angles = t.to(precise)[:, None] * MAX_PERIOD**-exponents
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


class UNetBlock(nn.Module):
    """Residual block of two convolutions, the embedding of the conditions added between them, and attention where asked for."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        direction: str | None = None,
        attention: bool = False,
        taps: tuple[int, ...] = (1, 1),
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.norm0 = group_norm(inputs)
        self.conv0 = Resample(inputs, outputs, 3, direction, taps)
        self.affine = nn.Linear(embedding, outputs)
        self.norm1 = group_norm(outputs)
        self.conv1 = Resample(outputs, outputs, 3)
        plain = inputs == outputs and direction is None
        self.skip = None if plain else Resample(inputs, outputs, 1, direction, taps)
        self.norm2 = group_norm(outputs) if attention else None
        self.qkv = Resample(outputs, 3 * outputs, 1) if attention else None
        self.proj = Resample(outputs, outputs, 1) if attention else None
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Xavier weights; those before each sum with the skip connection are almost 0, and attention's are smaller."""
        nn.init.xavier_uniform_(self.affine.weight)
        nn.init.zeros_(self.affine.bias)
        self.conv1.weight.mul_(1e-5)
        if self.qkv is not None and self.proj is not None:
            self.qkv.weight.mul_(math.sqrt(0.2))
            self.proj.weight.mul_(1e-5)

    def forward(self, x: Tensor, embedding: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B, E), (B, D, H', W') or None -> (B, D, H', W'). `mask` is the factors of dropout."""
        hidden = self.conv0(silu(self.norm0(x)))
        hidden = silu(self.norm1(hidden + self.affine(embedding)[:, :, None, None]))
        if mask is not None:
            hidden = hidden * mask
        x = (self.conv1(hidden) + (x if self.skip is None else self.skip(x))) * HALVED
        return x if self.qkv is None else (self._attend(x) + x) * HALVED

    def _attend(self, x: Tensor) -> Tensor:
        """Attention of one head over all places; a channel's query, key and value lie beside each other."""
        assert self.norm2 is not None
        assert self.qkv is not None
        assert self.proj is not None
        qkv: Tensor = self.qkv(self.norm2(x))
        # (B, 3 C, H, W) -> (3, B, 1, H W, C)
        qkv = qkv.reshape(len(x), x.shape[1], 3, x.shape[2] * x.shape[3])
        query, key, value = qkv.permute(2, 0, 3, 1)[:, :, None].unbind(0)
        mixed = scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(mixed[:, 0].transpose(1, 2).reshape(x.shape))
        return projected
