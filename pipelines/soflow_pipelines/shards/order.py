"""Shuffled order of samples: a function of (seed, epoch) and the manifest alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]

WINDOW_BYTES = 4 * 2**30
"""Samples are shuffled within windows of this many bytes of shards, so that a cache of two windows is enough for a set of any
size. A set that fits into one window is shuffled uniformly.
"""
KEPT_WINDOWS = 3
RUNS = 2**32
"""Streams from here on permute the runs of a window, those below it its samples."""


def philox_permutation(count: int, seed: int, epoch: int, stream: int) -> Int64Array:
    """A permutation of 0 .. count - 1 from the raw words of Philox, which are the same in every version of numpy."""
    bits = np.random.Philox(
        key=np.array([seed % 2**64, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64)
    )
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)


def in_runs(labels: Int64Array, run: int) -> tuple[Int64Array, Int64Array]:
    """(N,) labels -> (M, run) indices of samples of one class each, and (R,) of those that fill no run, in the order of `labels`."""
    by_class = np.argsort(labels, kind="stable")
    _, first, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    within = np.arange(len(labels)) - np.repeat(first, counts)
    fills = within < np.repeat(counts // run * run, counts)
    return by_class[fills].reshape(-1, run), np.sort(by_class[~fills])


@dataclass(frozen=True)
class _Epoch:
    """The windows of one epoch."""

    shards: tuple[tuple[int, ...], ...]
    """The shards of each window."""
    ends: Int64Array
    """Position in the epoch after the last sample of each window."""


class SampleOrder:
    """Maps positions to rows of the index.

    Positions count samples from the start of training; epochs follow one another without a gap. In each
    epoch the shards are permuted, cut in that order into windows, and the samples of a window permuted.

    With `run` above 1, for which the labels of all rows are needed, so many samples of one class follow each other: those of a
    class in a window are cut into runs, in their permuted order, and the runs permuted. What fills no run comes at the window's end.
    """

    def __init__(
        self,
        shard_samples: Sequence[int],
        shard_bytes: Sequence[int],
        seed: int,
        window_bytes: int = WINDOW_BYTES,
        run: int = 1,
        labels: NDArray[np.integer[Any]] | None = None,
    ) -> None:
        if run < 1 or (run > 1 and labels is None):
            raise ValueError(f"runs of {run} samples of one class need a length of at least 1, and labels")
        self._samples: Int64Array = np.asarray(shard_samples, dtype=np.int64)
        self._bytes: Int64Array = np.asarray(shard_bytes, dtype=np.int64)
        self._first_row: Int64Array = np.concatenate([[0], np.cumsum(self._samples)]).astype(np.int64)
        self._seed = seed
        self._window_bytes = window_bytes
        self._run, self._labels = run, labels
        self.epoch_samples = int(self._samples.sum())
        if not self.epoch_samples:
            raise ValueError("an order needs at least one sample")
        self._lock = Lock()
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], Int64Array] = OrderedDict()

    def rows(self, positions: Int64Array) -> Int64Array:
        """(B,) positions, counted from 0 -> (B,) rows of the index."""
        rows = np.empty(len(positions), np.int64)
        epochs, within = np.divmod(positions, self.epoch_samples)
        for epoch in np.unique(epochs):
            plan = self._epoch(int(epoch))
            window_of = np.searchsorted(plan.ends, within, side="right")
            for window in np.unique(window_of[epochs == epoch]):
                chosen = (epochs == epoch) & (window_of == window)
                start = plan.ends[window - 1] if window else 0
                rows[chosen] = self._window_rows(int(epoch), int(window))[within[chosen] - start]
        return rows

    def window(self, position: int) -> tuple[int, int]:
        """(epoch, number of the window) in which a position lies."""
        epoch, within = divmod(position, self.epoch_samples)
        return epoch, int(np.searchsorted(self._epoch(epoch).ends, within, side="right"))

    def windows(self, epoch: int) -> tuple[tuple[int, ...], ...]:
        """The shards of each window, in the order in which they are read."""
        return self._epoch(epoch).shards

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            plan = self._epochs.get(epoch)
            if plan is None:
                plan = self._plan(epoch)
                self._epochs[epoch] = plan
                while len(self._epochs) > KEPT_WINDOWS:
                    self._epochs.popitem(last=False)
            return plan

    def _plan(self, epoch: int) -> _Epoch:
        windows: list[list[int]] = []
        filled = self._window_bytes
        for shard in philox_permutation(len(self._samples), self._seed, epoch, stream=0).tolist():
            if filled >= self._window_bytes:
                windows.append([])
                filled = 0
            windows[-1].append(shard)
            filled += int(self._bytes[shard])
        counts = [int(self._samples[window].sum()) for window in windows]
        return _Epoch(tuple(tuple(window) for window in windows), np.cumsum(counts, dtype=np.int64))

    def _window_rows(self, epoch: int, window: int) -> Int64Array:
        key = (epoch, window)
        with self._lock:
            if key in self._windows:
                self._windows.move_to_end(key)
                return self._windows[key]
        shards = self.windows(epoch)[window]
        rows = np.concatenate([np.arange(self._first_row[s], self._first_row[s + 1]) for s in shards])
        rows = rows[philox_permutation(len(rows), self._seed, epoch, stream=window + 1)]
        if self._run > 1 and self._labels is not None:
            runs, rest = in_runs(self._labels[rows].astype(np.int64), self._run)
            runs = runs[philox_permutation(len(runs), self._seed, epoch, stream=RUNS + window)]
            rows = rows[np.concatenate([runs.ravel(), rest])]
        with self._lock:
            self._windows[key] = rows
            while len(self._windows) > KEPT_WINDOWS:
                self._windows.popitem(last=False)
        return rows
