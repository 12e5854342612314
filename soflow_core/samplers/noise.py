"""Noise and labels of samples: row i is a function of (seed, index i, draw) alone, in any batch.

Philox 4x32-10 (Salmon et al., SC 2011) in integer tensor arithmetic, and Box-Muller. Unlike torch's generators it is
the same in every version of torch, and uses all 64 bits of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

NOISE_STREAM = 0
LABEL_STREAM = 1


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10: counter of four and key of two 32-bit words -> four 32-bit words, in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two 32-bit words, without overflow of int64."""
    low = word * (constant & 0xFFFF)
    high = word * (constant >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _words(
    seed: int, indices: Tensor, count: int, draw: int, stream: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four (B, count) tensors of 32-bit words; the counter is (block, index, draw and stream)."""
    if not 0 <= draw < 1 << 16:
        raise ValueError(f"draw {draw} is outside 0 to {(1 << 16) - 1}")
    index = indices.to("cpu", torch.int64)[:, None].expand(-1, count)
    block = torch.arange(count)[None].expand(len(indices), -1)
    last = torch.full_like(block, draw | stream << 16)
    seed &= (1 << 64) - 1
    return philox((block, index & MASK, (index >> 32) & MASK, last), (seed & MASK, seed >> 32))


def sample_noise(seed: int, indices: Sequence[int] | Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """-> (B, *shape) float32 on the CPU, standard normal; `draw` numbers the noises of the same sample."""
    indices = torch.as_tensor(indices, dtype=torch.int64)
    size = math.prod(shape)
    w0, w1, w2, w3 = _words(seed, indices, -(-size // 4), draw, NOISE_STREAM)
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
    word = _words(seed, indices, 1, 0, LABEL_STREAM)[0][:, 0]
    return (word * classes) >> 32
