"""Kernel Inception Distance (Binkowski et al., 2018)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]

SUBSETS = 100
SUBSET_SIZE = 1000
SEED = 2020


def kernel_distance(
    generated: Array, real: Array, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = SEED
) -> tuple[float, float]:
    """Mean and standard deviation of the squared MMD over random subsets of (N, D) and (M, D) features.

    The subsets are a function of N, M and `seed`: numpy's RandomState, whose stream is fixed for all versions, draws without
    replacement, of the generated first. The seed and the sizes are torch-fidelity's.
    """
    if generated.shape[1] != real.shape[1]:
        raise ValueError(f"the sets have {generated.shape[1]} and {real.shape[1]} features")
    if not 2 <= subset_size <= min(len(generated), len(real)):
        raise ValueError(
            f"subsets of {subset_size} cannot be drawn of {len(generated)} and {len(real)} samples"
        )
    draw = np.random.RandomState(seed)
    values = np.empty(subsets)
    for number in range(subsets):
        x = generated[draw.choice(len(generated), subset_size, replace=False)]
        y = real[draw.choice(len(real), subset_size, replace=False)]
        values[number] = squared_mmd(x, y)
    return float(values.mean()), float(values.std())


def squared_mmd(x: Array, y: Array) -> float:
    """The unbiased estimate of MMD² with the kernel (xᵀy / D + 1)³, for (N, D) and (M, D) features."""
    ours, theirs = x.astype(np.float64), y.astype(np.float64)
    within = _mean_off_diagonal(_kernel(ours, ours)) + _mean_off_diagonal(_kernel(theirs, theirs))
    return within - 2 * float(_kernel(ours, theirs).mean())


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_off_diagonal(kernel: NDArray[np.float64]) -> float:
    count = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
