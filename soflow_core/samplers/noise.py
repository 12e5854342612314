"""Noise and labels of samples: row i is a function of (seed, index i, draw) alone, in any batch.

Philox 4x32-10 (`soflow_core.counter_draws`), and Box-Muller. Unlike torch's generators it is the same in every version
of torch, and uses all 64 bits of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from soflow_core.counter_draws import SAMPLE_LABELS, SAMPLE_NOISE, Words, fourth_word, random_words


def _words(seed: int, indices: Tensor, count: int, draw: int, stream: int) -> Words:
    """Four (B, count) tensors of 32-bit words; the counter is (block, index, draw and stream)."""
    index = indices.to("cpu", torch.int64)
    return random_words(seed, index, count, index >> 32, fourth_word(stream, draw))


def sample_noise(seed: int, indices: Sequence[int] | Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """-> (B, *shape) float32 on the CPU, standard normal; `draw` numbers the noises of the same sample."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    size = math.prod(shape)
    w0, w1, w2, w3 = _words(seed, indices, -(-size // 4), draw, SAMPLE_NOISE)
    normals = torch.stack([*_normals(w0, w1), *_normals(w2, w3)], dim=2)
    return normals.flatten(1)[:, :size].reshape(len(indices), *shape).float()


def _normals(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of 32-bit words -> two of independent normals in float64 (Box-Muller)."""
    radius = torch.sqrt(-2 * torch.log((first.double() + 0.5) / 2**32))
    angle = second.double() * (2 * math.pi / 2**32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def sample_labels(seed: int, indices: Sequence[int] | Tensor, classes: int, balanced: bool = False) -> Tensor:
    """-> (B,) int64: label i, uniform over the classes as a function of (seed, i); i modulo classes if balanced."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    if balanced:
        return indices % classes
    word = _words(seed, indices, 1, 0, SAMPLE_LABELS)[0][:, 0]
    return (word * classes) >> 32
