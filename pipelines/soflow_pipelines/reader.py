"""Random access to the samples of a shard set, wherever its shards lie."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soflow_pipelines.cache import LIMIT_VARIABLE, ShardCache
from soflow_pipelines.dataset_info import DatasetInfo, ShardError
from soflow_pipelines.order import SampleOrder
from soflow_pipelines.shards import UNLABELLED, npy_header, read_index, read_manifest
from soflow_pipelines.storage import LocalFolder, StorageError, open_storage

OPEN_FILES = 64
OPEN_CACHED_FILES = 16  # an open file keeps its room on the disk after the cache has dropped it
FETCHES = 4


class SampleReader:
    """Random access to the samples of a set, by row of its index; safe to use from several threads."""

    def __init__(self, uri: str | Path, info: DatasetInfo, cache: ShardCache | None = None) -> None:
        self._storage = open_storage(uri)
        local = isinstance(self._storage, LocalFolder)
        self.cache = None if local else cache or ShardCache.of_machine()
        self._open_files = OPEN_FILES if local else OPEN_CACHED_FILES
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
            file = _ShardFile(self.open_shard(shard))
            files[shard] = file
            if len(files) > self._open_files:
                files.popitem(last=False)
        return file.descriptor

    def open_shard(self, shard: int) -> int:
        """A descriptor of a local copy. ShardError where there is none, or it has another size."""
        record = self.shards[shard]
        place = f"{self._storage.uri}/{record.name}"
        try:
            if self.cache is not None:
                return self.cache.open(self._storage, record)
            assert isinstance(self._storage, LocalFolder)
            descriptor = os.open(self._storage.path(record.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{place} cannot be opened: {error.strerror}.") from error
        size = os.fstat(descriptor).st_size
        if size != record.bytes:
            os.close(descriptor)
            raise ShardError(f"{place} has {size} bytes, the manifest says {record.bytes}.")
        return descriptor

    def fetch(self, shard: int, stop: Event) -> None:
        """Brings a shard into the cache, unless it is stopped."""
        if self.cache is not None:
            self.cache.fetch(self._storage, self.shards[shard], stop)

    def _damage(self, row: int, what: str) -> ShardError:
        key = read_index(self._storage.uri, ["key"])["key"][row].as_py()
        shard = self.shards[self._shard[row]].name
        return ShardError(f"{self._storage.uri}/{shard}, sample {key}: {what}.")


class _ShardFile:
    """An open shard; closed when it is forgotten."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


class WindowFetcher:
    """Fetches the shards of the window being read, and of the next one, in the background.

    A fetch that fails is not reported here: the read that needs the shard tries again and says so.
    """

    def __init__(self, reader: SampleReader, order: SampleOrder) -> None:
        self._reader = reader
        self._order = order
        self._pool = ThreadPoolExecutor(FETCHES, "shard-fetch")
        self._asked: deque[tuple[int, int]] = deque(maxlen=4)
        self._lock = Lock()
        self._stop = Event()
        assert reader.cache is not None
        sizes = [shard.bytes for shard in reader.shards]
        window = max(sum(sizes[shard] for shard in shards) for shards in order.windows(0))
        if window > reader.cache.limit:
            raise StorageError(
                f"the cache {reader.cache.folder} may hold {reader.cache.limit / 1e9:.2f} GB, the samples are mixed "
                f"over {window / 1e9:.2f} GB: set {LIMIT_VARIABLE} to at least {2 * window / 1e9:.1f}."
            )
        self._ahead = 2 * window <= reader.cache.limit

    def reach(self, position: int) -> None:
        """Reading has come to this position."""
        epoch, window = self._order.window(position)
        self._ask(epoch, window)
        if self._ahead:
            last = window + 1 == len(self._order.windows(epoch))
            self._ask(*((epoch + 1, 0) if last else (epoch, window + 1)))

    def _ask(self, epoch: int, window: int) -> None:
        with self._lock:
            if (epoch, window) in self._asked:
                return
            self._asked.append((epoch, window))
        for shard in self._order.windows(epoch)[window]:
            self._pool.submit(self._reader.fetch, shard, self._stop)

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
