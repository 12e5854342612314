"""Ready batches from a shard set, in an order that can be resumed exactly."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.dataset_info import DatasetInfo, ShardError
from soflow_pipelines.images import to_unit_range
from soflow_pipelines.order import SampleOrder
from soflow_pipelines.shards import UNLABELLED, ShardRecord, npy_header, read_index, read_info, read_manifest
from soflow_pipelines.storage import LocalFolder, Storage, open_storage

OPEN_FILES = 64
AHEAD = 2

Posterior = Literal["sample", "mean", "moments"]


@dataclass(frozen=True)
class LoadedBatch:
    """The rows of one rank of one global batch."""

    x0: Tensor  # (B, C, H, W) float32, as the network takes it
    labels: Tensor | None  # (B,) int64; None where the set has no labels
    positions: Tensor  # (B,) int64, in the global order, counted from the start of training


class ShardLoader:
    """An endless iterator over batches of a shard set.

    The order is that of `SampleOrder`: a function of the seed, the epoch and the manifest. Epochs follow one
    another without dropping samples, so every batch is full. Rank `rank` takes the global positions
    `rank::world` of each global batch; all ranks make the same number of steps. The state is `consumed`, the
    samples that all ranks together have taken: a loader made with it goes on there, with any world size and
    any number of reading threads.

    Latents are drawn afresh at every position: x0 = (mean + std eps - shift) scaling, with eps a function of
    (seed, position). `posterior="mean"` leaves eps out; `posterior="moments"` gives the stored mean and std
    (B, 2C, H, W) as they are, for a draw on the training device.

    Each sample's CRC-32 is checked when this loader first reads it. A damaged one raises ShardError with
    shard, key and what is wrong.
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
    ) -> None:
        if batch_size < 1 or world < 1 or batch_size % world:
            raise ValueError(f"a global batch of {batch_size} does not divide over {world} ranks")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not among {world} ranks")
        if consumed < 0 or threads < 0:
            raise ValueError("the samples consumed and the number of threads are 0 or more")
        self.info = read_info(uri)
        self.consumed = consumed
        self._batch_size, self._rank, self._world, self._seed = batch_size, rank, world, seed
        self._posterior: Posterior = posterior
        self._samples = SampleReader(uri, self.info)
        shards = self._samples.shards
        self._order = SampleOrder([s.samples for s in shards], [s.bytes for s in shards], seed)
        self._pool = ThreadPoolExecutor(threads, "shard-loader") if threads else None
        self._ahead: deque[Future[LoadedBatch]] = deque()
        self._depth = AHEAD * max(1, threads)

    @property
    def epoch_samples(self) -> int:
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
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> ShardLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, start: int) -> LoadedBatch:
        positions = np.arange(start + self._rank, start + self._batch_size, self._world)
        arrays, labels = self._samples.read(self._order.rows(positions))
        return LoadedBatch(
            x0=self._ready(torch.from_numpy(arrays), positions),
            labels=None if self.info.classes is None else torch.from_numpy(labels),
            positions=torch.from_numpy(positions),
        )

    def _ready(self, stored: Tensor, positions: NDArray[np.int64]) -> Tensor:
        if self.info.kind == "pixels":
            return to_unit_range(stored)
        moments = stored.float()
        if self._posterior == "moments":
            return moments
        mean, std = moments.chunk(2, dim=1)
        if self._posterior == "sample":
            mean = mean + std * position_noise(self._seed, positions, mean.shape[1:])
        return (mean - self.info.shift) * self.info.scaling


def position_noise(seed: int, positions: NDArray[np.int64], shape: torch.Size) -> Tensor:
    """(B, *shape) float32, standard normal; row i is a function of (seed, positions[i]) alone."""
    noise = np.empty((len(positions), *shape), np.float32)
    for row, position in zip(noise, positions, strict=True):
        bits = np.random.Philox(key=np.array([seed % 2**64, position], np.uint64))
        np.random.Generator(bits).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(noise)


class SampleReader:
    """Random access to the samples of a set, by row of its index; safe to use from several threads."""

    def __init__(self, uri: str | Path, info: DatasetInfo) -> None:
        self._storage = open_storage(uri)
        self._info = info
        self.shards = read_manifest(uri)
        index = read_index(uri, ["shard", "label", "offset", "bytes", "crc32"])
        self._shard = index["shard"].to_numpy()
        self._label = index["label"].to_numpy().astype(np.int64)
        self._offset = index["offset"].to_numpy()
        self._crc = index["crc32"].to_numpy()
        self._header = npy_header(info.dtype, info.stored_shape)
        self._bytes = len(self._header) + int(np.prod(info.stored_shape)) * np.dtype(info.dtype).itemsize
        self._checked = np.zeros(len(self._shard), np.bool_)
        self._local = threading.local()
        self._check_index(index["bytes"].to_numpy())

    def _check_index(self, sizes: NDArray[Any]) -> None:
        uri, listed = self._storage.uri, sum(shard.samples for shard in self.shards)
        if not self._info.samples == listed == len(self._shard):
            raise ShardError(
                f"{uri}: dataset.json counts {self._info.samples} samples, manifest.parquet {listed} and "
                f"index.parquet {len(self._shard)}."
            )
        counts = np.bincount(self._shard, minlength=len(self.shards))
        for shard, count in zip(self.shards, counts, strict=True):
            if count != shard.samples:
                raise ShardError(
                    f"{uri}: manifest.parquet counts {shard.samples} samples in {shard.name}, "
                    f"index.parquet {count}."
                )
        wrong = np.flatnonzero(sizes != self._bytes)
        if len(wrong):
            raise self._damage(int(wrong[0]), f"{sizes[wrong[0]]} bytes listed, a sample has {self._bytes}")
        if self._info.classes is not None and (self._label == UNLABELLED).any():
            raise self._damage(int(np.argmin(self._label)), "no label")

    def read(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(B,) rows -> stored arrays (B, ...) and labels (B,) int64."""
        content = np.empty((len(rows), self._bytes), np.uint8)
        for row, buffer in zip(rows.tolist(), content, strict=True):
            shard = self._shard[row]
            if os.preadv(self._file(shard), (buffer.data,), self._offset[row]) != self._bytes:
                raise self._damage(row, "the shard ends inside it")
            if not self._checked[row]:
                self._check_sample(row, buffer)
        header = len(self._header)
        stored = np.ascontiguousarray(content[:, header:]).view(self._info.dtype)
        return stored.reshape(len(rows), *self._info.stored_shape), self._label[rows]

    def _check_sample(self, row: int, buffer: NDArray[np.uint8]) -> None:
        if bytes(buffer[: len(self._header)]) != self._header:
            raise self._damage(row, f"it is not {self._info.dtype} of shape {self._info.stored_shape}")
        if zlib.crc32(buffer.data) != self._crc[row]:
            raise self._damage(row, "its bytes are not those that were written (CRC-32 differs)")
        self._checked[row] = True

    def _file(self, shard: int) -> int:
        files: OrderedDict[int, _ShardFile] | None = getattr(self._local, "files", None)
        if files is None:
            files = self._local.files = OrderedDict()
        file = files.get(shard)
        if file is None:
            file = _ShardFile(self._storage, self.shards[shard])
            files[shard] = file
            if len(files) > OPEN_FILES:
                files.popitem(last=False)
        return file.descriptor

    def _damage(self, row: int, what: str) -> ShardError:
        key = read_index(self._storage.uri, ["key"])["key"][row].as_py()
        shard = self.shards[self._shard[row]].name
        return ShardError(f"{self._storage.uri}/{shard}, sample {key}: {what}.")


class _ShardFile:
    """An open shard; closed when it is forgotten."""

    def __init__(self, storage: Storage, record: ShardRecord) -> None:
        assert isinstance(storage, LocalFolder)
        self.descriptor = -1
        path = storage.path(record.name)
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path} cannot be opened: {error.strerror}.") from error
        size = os.fstat(self.descriptor).st_size
        if size != record.bytes:
            raise ShardError(f"{path} has {size} bytes, the manifest says {record.bytes}.")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
