"""Reservoir of samples whose choice depends on their indices alone, not on workers or order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray


def splitmix64(indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """(N,) -> (N,): a fixed permutation of the 64-bit numbers (SplitMix64; Steele, Lea and Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = indices.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Reservoir:
    """The features of at most `capacity` samples: those whose indices come first in a fixed permutation.

    The choice is a function of the set of indices alone, so any split over workers merges to the same one.
    """

    def __init__(self, dim: int, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a reservoir holds 1 sample or more, not {capacity}")
        self.dim, self.capacity, self.count = dim, capacity, 0
        # The system commits memory when it is first written, so the whole capacity may be allocated at once.
        self._indices = np.empty(capacity, np.int64)
        self._keys = np.empty(capacity, np.uint64)
        self._rows = np.empty((capacity, dim), np.float32)

    def update(self, indices: NDArray[np.int64], features: NDArray[np.float32]) -> None:
        """Offer samples (B,) with their features (B, D). Raises ValueError for an index that is held already."""
        unique, times = np.unique(np.concatenate([self._indices[: self.count], indices]), return_counts=True)
        if (times > 1).any():
            raise ValueError(f"sample {unique[times > 1][0]} came twice")
        keys = splitmix64(indices)
        all_keys = np.concatenate([self._keys[: self.count], keys])
        chosen = np.ones(len(all_keys), bool)
        if len(all_keys) > self.capacity:
            chosen[np.argpartition(all_keys, self.capacity - 1)[self.capacity :]] = False
        arrivals = np.flatnonzero(chosen[self.count :])
        room = np.flatnonzero(~chosen[: self.count])
        free = np.arange(self.count, self.count + len(arrivals) - len(room))
        places = np.concatenate([room, free])
        self._indices[places], self._keys[places] = indices[arrivals], keys[arrivals]
        self._rows[places] = features[arrivals]
        self.count += len(free)

    def merge(self, other: Reservoir) -> None:
        """Add the samples of another worker's reservoir."""
        if (other.dim, other.capacity) != (self.dim, self.capacity):
            raise ValueError(
                f"a reservoir of {other.capacity} x {other.dim} cannot join one of {self.capacity} x {self.dim}"
            )
        self.update(other._indices[: other.count], other._rows[: other.count])

    @property
    def features(self) -> NDArray[np.float32]:
        """(N, D), in the order of the indices."""
        return self._rows[np.argsort(self._indices[: self.count])]

    def state(self) -> dict[str, NDArray]:
        """Arrays to keep in an .npz file."""
        order = np.argsort(self._indices[: self.count])
        return {
            "capacity": np.asarray(self.capacity),
            "indices": self._indices[order],
            "features": self._rows[order],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> Reservoir:
        """The reservoir that `state` was taken of."""
        reservoir = cls(state["features"].shape[1], int(state["capacity"]))
        reservoir.update(np.asarray(state["indices"], np.int64), np.asarray(state["features"], np.float32))
        return reservoir


def fixed_subset(total: int, count: int) -> NDArray[np.int64]:
    """(count,) of the numbers 0 .. total - 1, ascending: those that come first in a fixed permutation.

    Image sets are often sorted by class, so their first `count` images would be of few classes.
    """
    return np.sort(np.argsort(splitmix64(np.arange(total)))[:count])
