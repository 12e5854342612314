"""Inception Score from sums over splits of the samples (Salimans et al., 2016)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.metrics.reservoir import splitmix64

SPLITS = 10


class InceptionScoreSums:
    """Per tenth of the samples: their number, the sum of p(y|x), and the sum of p log p.

    exp(mean KL(p(y|x) || p(y))) of a split follows from these three, so neither the order nor the split over workers matters. Tenth
    s of N samples are those from place s N // 10 up to (s + 1) N // 10 in a fixed permutation of the indices: images that are sorted
    by class would give splits of one class each.
    """

    def __init__(self, classes: int, samples: int) -> None:
        self.classes, self.samples = classes, samples
        starts = np.arange(1, SPLITS) * samples // SPLITS
        self._split = np.empty(samples, np.int64)
        self._split[np.argsort(splitmix64(np.arange(samples)))] = np.searchsorted(
            starts, np.arange(samples), side="right"
        )
        self.counts = np.zeros(SPLITS, np.int64)
        self._probabilities = np.zeros((SPLITS, classes))
        self._negentropy = np.zeros(SPLITS)

    def update(self, indices: NDArray[np.int64], logits: Tensor) -> None:
        """Add the logits (B, K) of the samples (B,), which are numbered from 0 to N - 1."""
        if logits.ndim != 2 or logits.shape != (len(indices), self.classes):
            raise ValueError(
                f"{len(indices)} samples of {self.classes} classes have logits {tuple(logits.shape)}"
            )
        if len(indices) and (indices.min() < 0 or indices.max() >= self.samples):
            raise ValueError(f"samples are numbered from 0 to {self.samples - 1}, not up to {indices.max()}")
        logs = torch.log_softmax(logits.detach().to("cpu", torch.float64), dim=1).numpy()
        if not np.isfinite(logs).all():
            raise ValueError("a logit is not finite")
        probabilities = np.exp(logs)
        split = self._split[indices]
        np.add.at(self.counts, split, 1)
        np.add.at(self._probabilities, split, probabilities)
        np.add.at(self._negentropy, split, (probabilities * logs).sum(1))

    def merge(self, other: InceptionScoreSums) -> None:
        """Add the sums of another worker."""
        if (other.classes, other.samples) != (self.classes, self.samples):
            raise ValueError(
                f"sums over {other.samples} samples of {other.classes} classes cannot join those over "
                f"{self.samples} of {self.classes}"
            )
        self.counts += other.counts
        self._probabilities += other._probabilities
        self._negentropy += other._negentropy

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        if not self.counts.all():
            raise ValueError(f"an Inception Score needs a sample in each of {SPLITS} splits")
        marginal = self._probabilities / self.counts[:, None]
        logs = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0)
        values = np.exp(self._negentropy / self.counts - (marginal * logs).sum(1))
        return float(values.mean()), float(values.std())

    def state(self) -> dict[str, NDArray]:
        """Arrays to keep in an .npz file."""
        return {
            "samples": np.asarray(self.samples),
            "counts": self.counts.copy(),
            "probabilities": self._probabilities.copy(),
            "negentropy": self._negentropy.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> InceptionScoreSums:
        """The sums that `state` was taken of."""
        sums = cls(state["probabilities"].shape[1], int(state["samples"]))
        sums.counts = np.asarray(state["counts"], np.int64).copy()
        sums._probabilities = np.asarray(state["probabilities"], np.float64).copy()
        sums._negentropy = np.asarray(state["negentropy"], np.float64).copy()
        return sums
