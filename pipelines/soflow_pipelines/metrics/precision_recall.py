"""Improved precision and recall: how much of one set lies on the manifold of the other (Kynkäänniemi et al., 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEIGHBOURS = 3
BLOCK_ELEMENTS = 2**24
"""Distances held at a time, float64."""

EQUAL = 1e-12
"""Squared distances below this part of the squared norms are rounding: the vectors are the same."""


def precision_recall(
    generated: NDArray[np.floating],
    real: NDArray[np.floating],
    neighbours: int = NEIGHBOURS,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """(N, D) and (M, D) features -> the share of generated samples on the real manifold, and of real ones on the generated.

    A manifold is the union of balls around its samples that reach to the `neighbours`-th other sample; the boundary belongs to it.
    """
    if generated.shape[1] != real.shape[1]:
        raise ValueError(f"the sets have {generated.shape[1]} and {real.shape[1]} features")
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"manifolds by {neighbours} neighbours need {neighbours + 1} samples, there are {len(generated)} and {len(real)}"
        )
    fake = torch.as_tensor(np.asarray(generated, np.float64), device=device)
    true = torch.as_tensor(np.asarray(real, np.float64), device=device)
    return _covered(fake, true, neighbours), _covered(true, fake, neighbours)


def _covered(points: Tensor, centres: Tensor, neighbours: int) -> float:
    radii = torch.cat(
        [block.kthvalue(neighbours + 1).values for block in _squared_distances(centres, centres)]
    )
    inside = sum(int((block <= radii).any(1).sum()) for block in _squared_distances(points, centres))
    return inside / len(points)


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of the (N, M) squared distances of (N, D) and (M, D)."""
    lengths_b = b.square().sum(1)
    for rows in a.split(max(1, BLOCK_ELEMENTS // len(b))):
        lengths = rows.square().sum(1, keepdim=True) + lengths_b
        squared = torch.addmm(lengths, rows, b.T, alpha=-2)
        yield torch.where(squared <= EQUAL * lengths, 0.0, squared)
