"""Fréchet distance of two sets of features, and streaming mean and covariance of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Float64Array = NDArray[np.float64]

PENDING_VECTORS = 1024
"""Vectors that are buffered and added to the covariance together: batch by batch costs more than the network on a GPU."""


class Moments(Protocol):
    """Mean (D,) and unbiased covariance (D, D) of a set of vectors; `principal_axes` (D, R) times its transpose is the covariance."""

    @property
    def dim(self) -> int: ...

    @property
    def mean(self) -> Float64Array: ...

    @property
    def covariance(self) -> Float64Array: ...

    @property
    def principal_axes(self) -> Float64Array: ...


@dataclass(frozen=True)
class GaussianMoments:
    """Mean and covariance as plain arrays."""

    mean: Float64Array
    """(D,)"""
    covariance: Float64Array
    """(D, D), unbiased"""
    count: int | None = None
    """Number of vectors behind them; None where it is not known."""

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.covariance.shape != (self.dim, self.dim):
            raise ValueError(
                f"a mean {self.mean.shape} and a covariance {self.covariance.shape} do not fit together"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("a mean or covariance is not finite")

    @property
    def dim(self) -> int:
        return len(self.mean)

    @cached_property
    def principal_axes(self) -> Float64Array:
        """(D, R); cached, for a reference is compared with many times."""
        return _principal_axes(self.covariance)


class FeatureStatistics:
    """Count, mean and scatter of feature vectors in float64, updated batch by batch and merged over workers."""

    def __init__(self, dim: int) -> None:
        self._count = 0
        self._mean: Float64Array = np.zeros(dim)
        self._scatter: Float64Array = np.zeros((dim, dim))
        self._pending: list[Float64Array] = []

    @property
    def dim(self) -> int:
        return len(self._mean)

    @property
    def count(self) -> int:
        return self._count + sum(len(batch) for batch in self._pending)

    @property
    def mean(self) -> Float64Array:
        """(D,)"""
        self._flush()
        return self._mean

    @property
    def covariance(self) -> Float64Array:
        """(D, D), unbiased. Raises ValueError for fewer than two vectors."""
        self._flush()
        if self._count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, there are {self._count}")
        return self._scatter / (self._count - 1)

    @property
    def principal_axes(self) -> Float64Array:
        """(D, R)"""
        return _principal_axes(self.covariance)

    def update(self, features: Tensor | ArrayLike) -> None:
        """Add features (B, D). Raises ValueError where D differs or a value is not finite."""
        values = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
        batch: Float64Array = np.array(values, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(f"features have shape {batch.shape}, the statistics take (B, {self.dim})")
        if not np.isfinite(batch).all():
            raise ValueError("a feature is not finite")
        self._pending.append(batch)
        if self.count - self._count >= PENDING_VECTORS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            batch = np.concatenate(self._pending)
            self._pending.clear()
            if len(batch):
                mean = batch.mean(0)
                centred = batch - mean
                self._combine(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add the statistics of another worker."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} features cannot join those of {self.dim}")
        self._flush()
        other._flush()
        if other._count:
            self._combine(other._count, other._mean, other._scatter.copy())

    def _combine(self, count: int, mean: Float64Array, scatter: Float64Array) -> None:
        # Chan et al. (1979): no sum of squares, so nothing cancels when the mean is large.
        total = self._count + count
        shift = mean - self._mean
        if self._count:
            scatter += np.outer(shift, shift * (self._count * count / total))
        self._scatter += scatter
        self._mean = self._mean + shift * (count / total)
        self._count = total

    def moments(self) -> GaussianMoments:
        """A copy of the moments as they are now."""
        return GaussianMoments(self.mean.copy(), self.covariance, self.count)

    def state(self) -> dict[str, NDArray]:
        """Arrays to keep in an .npz file."""
        self._flush()
        return {
            "count": np.asarray(self._count),
            "mean": self._mean.copy(),
            "scatter": self._scatter.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> FeatureStatistics:
        """The statistics that `state` was taken of."""
        statistics = cls(len(state["mean"]))
        statistics._count = int(state["count"])
        statistics._mean = np.asarray(state["mean"], dtype=np.float64).copy()
        statistics._scatter = np.asarray(state["scatter"], dtype=np.float64).copy()
        return statistics


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^½) for the Gaussians with these moments (Heusel et al., 2017).

    With A = U a Uᵀ and B = V b Vᵀ, the trace of the root is the sum of the singular values of a^½ Uᵀ V b^½: real for every pair of
    covariances, without jitter where one is singular, and of the size of their ranks alone.
    """
    if a.dim != b.dim:
        raise ValueError(f"the statistics have {a.dim} and {b.dim} features")
    cov_a, cov_b = a.covariance, b.covariance
    root_trace = np.linalg.svd(a.principal_axes.T @ b.principal_axes, compute_uv=False).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    return float(max(distance, 0.0))


def _principal_axes(covariance: Float64Array) -> Float64Array:
    """(D, D) -> (D, R), the eigenvectors of positive variance, each scaled by its standard deviation."""
    values, vectors = np.linalg.eigh(covariance)
    positive = values > 0
    return vectors[:, positive] * np.sqrt(values[positive])
