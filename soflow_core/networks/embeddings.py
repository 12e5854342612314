"""Embeddings of the conditions of a network: times and labels."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from soflow_core.labels import NULL_LABEL

FREQUENCIES = 256
"""Width of the sinusoidal time embedding."""

MAX_PERIOD = 10_000.0
"""Longest period of the sinusoids of times and positions."""


class TimeEmbedder(nn.Module):
    """Embedding of a time, unscaled: sinusoids, then two linear layers. (B,) -> (B, hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, t: Tensor) -> Tensor:
        half, weight = FREQUENCIES // 2, cast(nn.Linear, self.mlp[0]).weight
        # At least float32, also with bfloat16 weights: a time in bfloat16 has three digits.
        precise = torch.promote_types(weight.dtype, torch.float32)
        exponents = torch.arange(half, dtype=precise, device=t.device) / half
        angles = t[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
        sinusoids = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
        embedded: Tensor = self.mlp(sinusoids.to(weight.dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Table of label embeddings, with a last row for the null label if any: (B,) int64 -> (B, hidden)."""

    def __init__(self, classes: int, null_label: bool, hidden: int) -> None:
        super().__init__()
        self.classes = classes
        self.null_label = null_label
        self.embedding_table = nn.Embedding(classes + int(null_label), hidden)

    def forward(self, labels: Tensor) -> Tensor:
        rows: Tensor = self.embedding_table(torch.where(labels == NULL_LABEL, self.classes, labels))
        return rows
