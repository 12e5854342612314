"""Training batches from a shard set, in an order that can be resumed exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.shards.cache import ShardCache
from soflow_pipelines.shards.order import SampleOrder
from soflow_pipelines.shards.prefetch import WindowFetcher
from soflow_pipelines.shards.reader import SampleReader
from soflow_pipelines.shards.tables import read_info

AHEAD = 2
"""Batches that each reading thread has in progress or finished."""

Posterior = Literal["sample", "mean", "moments", "stored"]
"""What is read of a latent: a sample of its posterior, the posterior's mean, or mean and standard deviation; `stored` gives the rows
of any set as they are stored, for `training_rows`."""


@dataclass(frozen=True)
class LoadedBatch:
    """One rank's rows of one global batch."""

    x0: Tensor
    """(B, C, H, W) float32, as a network takes it; where rows are read as they are stored, that, pinned where a GPU is."""
    labels: Tensor | None
    """(B,) int64; None where the set has no labels."""
    positions: Tensor
    """(B,) int64, in the global order, counted from the start of training."""


class ShardLoader:
    """An endless iterator over batches of a shard set.

    The order is that of `SampleOrder`: a function of the seed, the epoch and the manifest. Epochs follow one
    another without dropping samples, so every batch is full. Rank `rank` reads the global positions
    `rank::world` of each global batch, so that the first ranks have a row more where it does not divide; all
    ranks make the same number of steps. The state is `consumed`, the samples that all ranks together have
    read: a loader that is created with it continues there, with any world size and any number of threads.

    With `class_run` above 1 so many samples of one class follow each other, as `SampleOrder` has it.

    A latent is sampled anew at every position: x0 = (mean + std eps - shift) scaling, with eps a function of
    (seed, position). `posterior="mean"` leaves eps out; `posterior="moments"` returns the stored mean and std
    (B, 2C, H, W) in float32; `posterior="stored"` returns uint8 pixels or moments of the stored type, for `training_rows`.

    Remote shards are read through `cache`, by default `ShardCache.of_machine()`; those of the window that is
    being read and of the next one are fetched in the background.

    Each sample's CRC-32 is checked when this loader first reads it. Raises ShardError with shard, key and what
    is wrong for a damaged one, StorageError where a shard cannot be fetched, ValueError for impossible settings.
    """

    def __init__(
        self,
        uri: str | Path,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        consumed: int = 0,
        *,
        threads: int = 1,
        posterior: Posterior = "sample",
        cache: ShardCache | None = None,
        class_run: int = 1,
    ) -> None:
        if not 1 <= world <= batch_size:
            raise ValueError(f"a global batch of {batch_size} has no row for each of {world} ranks")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not among {world} ranks")
        if consumed < 0 or threads < 0:
            raise ValueError("the samples consumed and the number of threads are 0 or more")
        self.info = read_info(uri)
        self.consumed = consumed
        self._batch_size, self._rank, self._world, self._seed = batch_size, rank, world, seed
        self.posterior: Posterior = posterior
        """May be changed until the first batch is read."""
        self._samples = SampleReader(uri, self.info, cache)
        shards = self._samples.shards
        if class_run > 1 and self.info.classes is None:
            raise ValueError(
                f"samples cannot come in runs of {class_run} of one class: the set has no labels"
            )
        self._order = SampleOrder(
            [s.samples for s in shards],
            [s.bytes for s in shards],
            seed,
            run=class_run,
            labels=self._samples.labels,
        )
        self._fetcher = WindowFetcher(self._samples, self._order) if self._samples.cache else None
        self._pool = ThreadPoolExecutor(threads, "shard-loader") if threads else None
        self._ahead: deque[Future[LoadedBatch]] = deque()
        self._depth = AHEAD * max(1, threads)

    @property
    def epoch_samples(self) -> int:
        """Samples of the set."""
        return self._order.epoch_samples

    def __iter__(self) -> Iterator[LoadedBatch]:
        return self

    def __next__(self) -> LoadedBatch:
        if self._pool is None:
            batch = self._read(self.consumed)
        else:
            while len(self._ahead) < self._depth:
                start = self.consumed + len(self._ahead) * self._batch_size
                self._ahead.append(self._pool.submit(self._read, start))
            batch = self._ahead.popleft().result()
        self.consumed += self._batch_size
        return batch

    def close(self) -> None:
        """Stops the reading threads."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        if self._fetcher is not None:
            self._fetcher.close()
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> ShardLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, start: int) -> LoadedBatch:
        if self._fetcher is not None:
            self._fetcher.reach(start)
        positions = np.arange(start + self._rank, start + self._batch_size, self._world)
        rows = self._order.rows(positions)
        if self.posterior == "stored":
            x0, labels = self._stored(rows)
        else:
            arrays, labels = self._samples.read(rows)
            x0 = self._ready(torch.from_numpy(arrays), positions)
        return LoadedBatch(
            x0=x0,
            labels=None if self.info.classes is None else torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
        )

    def _stored(self, rows: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
        """Rows in their stored type, in memory of their own from which a GPU can copy while other work is done, and labels."""
        dtype = getattr(torch, self.info.dtype)
        stored = torch.empty(
            len(rows), *self.info.stored_shape, dtype=dtype, pin_memory=torch.cuda.is_available()
        )
        _, labels = self._samples.read(rows, stored.numpy())
        return stored, labels

    def _ready(self, stored: Tensor, positions: NDArray[np.int64]) -> Tensor:
        if self.info.kind == "pixels":
            return to_unit_range(stored)
        if self.posterior == "moments":
            return stored.to(torch.float32, copy=True)
        mean, std = stored.chunk(2, dim=1)
        if self.posterior == "mean":
            drawn = mean.to(torch.float32, copy=True)
        else:
            drawn = position_noise(self._seed, positions, mean.shape[1:]).mul_(std).add_(mean)
        return drawn.sub_(self.info.shift).mul_(self.info.scaling)


def position_noise(seed: int, positions: NDArray[np.int64], shape: torch.Size) -> Tensor:
    """(B, *shape) float32, standard normal; row i is a function of (seed, positions[i]) alone."""
    noise = np.empty((len(positions), *shape), np.float32)
    for row, position in zip(noise, positions, strict=True):
        bits = np.random.Philox(key=np.array([seed % 2**64, position], np.uint64))
        np.random.Generator(bits).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)
