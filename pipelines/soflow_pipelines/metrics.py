"""Scores of generated images: Fréchet distance on features, agreement with the labels asked for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Float64Array = NDArray[np.float64]


class FeatureStatistics:
    """Count, mean and scatter of feature vectors in float64, gathered by batch and merged over workers."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean: Float64Array = np.zeros(dim)
        self._scatter: Float64Array = np.zeros((dim, dim))

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Float64Array:
        """(D, D), unbiased. ValueError for fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, there are {self.count}")
        return self._scatter / (self.count - 1)

    def update(self, features: Tensor | ArrayLike) -> None:
        """Adds (B, D) features. ValueError where D differs or a value is not finite."""
        values = features.detach().cpu().numpy() if isinstance(features, Tensor) else features
        batch: Float64Array = np.asarray(values, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] != self.dim:
            raise ValueError(f"features have shape {batch.shape}, the statistics take (B, {self.dim})")
        if not np.isfinite(batch).all():
            raise ValueError("a feature is not finite")
        if len(batch):
            mean = batch.mean(0)
            centred = batch - mean
            self._combine(len(batch), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Adds what another worker gathered."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {other.dim} features cannot join those of {self.dim}")
        if other.count:
            self._combine(other.count, other.mean, other._scatter)

    def _combine(self, count: int, mean: Float64Array, scatter: Float64Array) -> None:
        # Chan et al. (1979): no sum of squares, so nothing cancels when the mean is large.
        total = self.count + count
        shift = mean - self.mean
        self._scatter = self._scatter + scatter + np.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def state(self) -> dict[str, NDArray]:
        """Arrays to keep in an .npz file."""
        return {"count": np.asarray(self.count), "mean": self.mean.copy(), "scatter": self._scatter.copy()}

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> FeatureStatistics:
        statistics = cls(len(state["mean"]))
        statistics.count = int(state["count"])
        statistics.mean = np.asarray(state["mean"], dtype=np.float64).copy()
        statistics._scatter = np.asarray(state["scatter"], dtype=np.float64).copy()
        return statistics


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|² + tr(A + B - 2 (A B)^½) for the Gaussians with these moments.

    The trace of the root is taken from the singular values of A^½ B^½, so that it is real and no
    jitter is needed where a covariance is singular.
    """
    if a.dim != b.dim:
        raise ValueError(f"the statistics have {a.dim} and {b.dim} features")
    cov_a, cov_b = a.covariance, b.covariance
    root_trace = np.linalg.svd(_square_root(cov_a) @ _square_root(cov_b), compute_uv=False).sum()
    shift = a.mean - b.mean
    distance = shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * root_trace
    return float(max(distance, 0.0))


def _square_root(covariance: Float64Array) -> Float64Array:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def label_agreement(logits: Tensor, labels: Tensor) -> float:
    """The share of (B, K) logits whose largest entry is at the label (B,)."""
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit together")
    if not len(labels):
        raise ValueError("the agreement of no images is undefined")
    return float((logits.argmax(1).cpu() == labels.cpu()).float().mean())
