"""Blocks and output layer of a diffusion transformer, modulated by the condition (adaLN-Zero) or with condition tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from soflow_core.networks.layers import Attention


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, N, D), (B, D), (B, D) -> (B, N, D): x (1 + scale) + shift."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """Transformer block: attention and MLP, each modulated and gated by the condition (adaLN-Zero).

    With condition tokens there is no modulation: norms have learned factors and shifts, and each gate is a learned vector.
    """

    def __init__(
        self, hidden: int, heads: int, mlp: nn.Module, qk_norm: bool = False, adaln: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=not adaln, eps=1e-6)
        self.attn = Attention(hidden, heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=not adaln, eps=1e-6)
        self.mlp = mlp
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden)) if adaln else None
        self.gates = None if adaln else nn.Parameter(torch.zeros(2, hidden))

    def forward(self, x: Tensor, condition: Tensor | None, rotation: Tensor | None = None) -> Tensor:
        """(B, N, D), (B, D) or None, (2, N, D / heads / 2) or None -> (B, N, D)."""
        if self.adaLN_modulation is None or condition is None:
            assert self.gates is not None
            gate_a, gate_m = self.gates
            x = x + gate_a * self.attn(self.norm1(x), rotation)
            return x + gate_m * self.mlp(self.norm2(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attn(modulate(self.norm1(x), shift_a, scale_a), rotation)
        return x + gate_m[:, None] * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FinalLayer(nn.Module):
    """Output layer, tokens to pixels: (B, N, D), (B, D) or None -> (B, N, patch * patch * channels)."""

    def __init__(self, hidden: int, patch: int, channels: int, adaln: bool = True) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden, elementwise_affine=not adaln, eps=1e-6)
        self.linear = nn.Linear(hidden, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden)) if adaln else None

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        x = self.norm_final(x)
        if self.adaLN_modulation is not None and condition is not None:
            x = modulate(x, *self.adaLN_modulation(condition).chunk(2, dim=1))
        pixels: Tensor = self.linear(x)
        return pixels
