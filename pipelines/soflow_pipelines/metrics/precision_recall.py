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
    real_radii: NDArray[np.float64] | None = None,
) -> tuple[float, float]:
    """(N, D) and (M, D) features -> the share of generated samples on the real manifold, and of real ones on the generated.

    A manifold is the union of balls around its samples that reach to the `neighbours`-th other sample; the boundary belongs to it.
    `real_radii` are the `squared_radii` of the real samples where they are known: of 50,000 they take a minute of a core.
    """
    if generated.shape[1] != real.shape[1]:
        raise ValueError(f"the sets have {generated.shape[1]} and {real.shape[1]} features")
    if min(len(generated), len(real)) <= neighbours:
        raise ValueError(
            f"manifolds by {neighbours} neighbours need {neighbours + 1} samples, there are {len(generated)} and {len(real)}"
        )
    fake, true = _on(device, generated), _on(device, real)
    radii = _squared_radii(true, neighbours) if real_radii is None else _on(device, real_radii)
    return _covered(fake, true, radii), _covered(true, fake, _squared_radii(fake, neighbours))


def squared_radii(
    samples: NDArray[np.floating], neighbours: int = NEIGHBOURS, device: str | torch.device = "cpu"
) -> NDArray[np.float64]:
    """(N, D) features -> (N,) squared distances to the `neighbours`-th other sample: the manifold's balls."""
    radii: NDArray[np.float64] = _squared_radii(_on(device, samples), neighbours).cpu().numpy()
    return radii


def _on(device: str | torch.device, numbers: NDArray[np.floating]) -> Tensor:
    return torch.as_tensor(np.asarray(numbers, np.float64), device=device)


def _squared_radii(centres: Tensor, neighbours: int) -> Tensor:
    # The sample itself is the nearest. `kthvalue` takes ten times as long.
    return torch.cat(
        [
            block.topk(neighbours + 1, largest=False).values[:, -1]
            for block in _squared_distances(centres, centres)
        ]
    )


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = sum(int((block <= radii).any(1).sum()) for block in _squared_distances(points, centres))
    return inside / len(points)


def _squared_distances(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Blocks of rows of the (N, M) squared distances of (N, D) and (M, D)."""
    lengths_b = b.square().sum(1)
    for rows in a.split(max(1, BLOCK_ELEMENTS // len(b))):
        lengths = rows.square().sum(1, keepdim=True) + lengths_b
        squared = torch.addmm(lengths, rows, b.T, alpha=-2)
        yield squared.masked_fill_(squared <= lengths.mul_(EQUAL), 0.0)
