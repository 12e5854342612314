"""Layers of a vision transformer: patch embedding, self-attention and MLP.

Parameters have the names of timm's layers, which the official SoFlow checkpoints use.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from soflow_core.networks.positions import rotate


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping square patches: (B, C, H, W) -> (B, N, hidden), row by row."""

    def __init__(self, channels: int, patch: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        embedded: Tensor = self.proj(x)
        return embedded.flatten(2).transpose(1, 2)


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with learned factors, computed in float32 at the least."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = precise * torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention without dropout: (B, N, hidden) -> (B, N, hidden).

    `qk_norm` divides each query and key by its root mean square before they are compared. `rotation` (2, N, hidden / heads / 2)
    turns them by their positions.
    """

    def __init__(self, hidden: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = RMSNorm(hidden // heads) if qk_norm else None
        self.k_norm = RMSNorm(hidden // heads) if qk_norm else None
        self.proj = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        batch, tokens, hidden = x.shape
        # (B, N, 3 hidden) -> (3, B, heads, N, hidden / heads)
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mixed = scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, hidden))
        return projected


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them: (B, N, hidden) -> (B, N, hidden)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden, inner)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class GatedMlp(nn.Module):
    """Two linear layers, one gated by the SiLU of the other, and one back (SwiGLU, arXiv 2002.05202): as `Mlp`."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(hidden, inner)
        self.fc1_x = nn.Linear(hidden, inner)
        self.fc2 = nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(silu(self.fc1_g(x)) * self.fc1_x(x))
        return result
