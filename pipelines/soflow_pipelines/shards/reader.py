"""Random access to the samples of a shard set, local or remote."""

from __future__ import annotations

import os
import sys
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from soflow_core.failures import printable, summarize
from soflow_pipelines.shards.cache import ShardCache
from soflow_pipelines.shards.index_checks import COLUMNS, RowChecks, member_bytes
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.order import WINDOW_BYTES
from soflow_pipelines.shards.tables import (
    INDEX_NAME,
    INDEX_SCHEMA,
    OpenTable,
    ShardRecord,
    read_index,
    read_manifest,
)
from soflow_pipelines.shards.writer import BLOCK, npy_header
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import StorageError
from soflow_pipelines.storage.opening import open_storage

MOST_MAPPED = 2**15
"""Shards mapped at a time: Linux gives a process 65,530 mappings, which other libraries need too."""


class SampleReader:
    """Random access to the samples of a set, by row of its index; thread-safe.

    Each sample is checked against the index (CRC-32) when it is first read. Raises ShardError with shard, key and
    what is wrong where index, manifest and shards contradict each other, StorageError where a shard cannot be fetched.
    """

    def __init__(self, uri: str | Path, info: DatasetInfo, cache: ShardCache | None = None) -> None:
        self._store = open_storage(uri)
        local = isinstance(self._store, LocalFolder)
        self.cache = None if local else cache or ShardCache.of_machine()
        self._maps: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()
        self._mapped_bytes = 0
        self._most_mapped = sys.maxsize if local else WINDOW_BYTES
        self._lock = Lock()
        self._info = info
        self.shards = read_manifest(uri, label_counts=False)
        # 13 bytes a sample: the shard follows from the row, and offsets are multiples of a block of tar.
        self._first_row = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self._read_index(OpenTable(self._store, INDEX_NAME, INDEX_SCHEMA, [*COLUMNS, "crc32"]))
        # Arrow keeps what it has freed for its next table, which for this size does not come.
        pa.default_memory_pool().release_unused()
        self._header = npy_header(info.dtype, info.stored_shape)
        self._bytes = member_bytes(info)
        self._checked = np.zeros(len(self.labels), np.bool_)
        self._local = threading.local()
        if local and len(self.shards) > MOST_MAPPED:
            for shard in range(len(self.shards)):
                self._check_size(shard)
        elif local:
            # All at once: mapped one by one between batches they would scatter small blocks over the heap,
            # and memory would grow with their number. It also detects a missing or truncated shard at the start.
            for shard in range(len(self.shards)):
                self._map(shard)

    def _read_index(self, index: OpenTable) -> None:
        """Fills labels, places and checksums, part by part, so that little more is in memory than what stays there."""
        uri, listed = self._store.uri, sum(shard.samples for shard in self.shards)
        if not self._info.samples == listed == index.rows:
            raise ShardError(
                f"{uri}: dataset.json counts {self._info.samples} samples, manifest.parquet {listed} and "
                f"index.parquet {index.rows}."
            )
        self.labels = np.empty(index.rows, np.int32)
        self._block = np.empty(index.rows, _block_type(self.shards))
        self._crc = np.empty(index.rows, np.uint32)
        checks, counts, start = RowChecks(self._info, self.shards), np.zeros(len(self.shards), np.int64), 0
        for part in index.parts():
            for row, what in checks.defects(part):
                raise self._damage(start + row, part["shard"][row].as_py(), what)
            rows = slice(start, start + len(part))
            self.labels[rows] = part["label"].to_numpy()
            self._block[rows] = part["offset"].to_numpy() // BLOCK
            self._crc[rows] = part["crc32"].to_numpy()
            counts += np.bincount(part["shard"].to_numpy(), minlength=len(counts))
            start = rows.stop
        for shard, count in zip(self.shards, counts.tolist(), strict=True):
            if count != shard.samples:
                raise ShardError(
                    f"{uri}: manifest.parquet counts {shard.samples} samples in {shard.name}, "
                    f"index.parquet {count}."
                )

    def read(
        self, rows: NDArray[np.int64], out: NDArray[Any] | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """(B,) rows -> stored arrays (B, ...) and labels (B,) int64. Raises ShardError.

        The arrays are written to `out`; without it they are valid until this thread's next call.
        """
        stored = self._buffer(len(rows)) if out is None else out
        content = stored.reshape(len(rows), -1).view(np.uint8)
        header = len(self._header)
        shards = self._shards_of(rows).tolist()
        offsets = (self._block[rows].astype(np.int64) * BLOCK).tolist()
        checked = self._checked[rows].tolist()
        for number, row in enumerate(rows.tolist()):
            shard, offset = self._map(shards[number]), offsets[number]
            if not checked[number]:
                self._check_sample(row, shard[offset : offset + self._bytes])
            content[number] = shard[offset + header : offset + self._bytes]
        return stored, self.labels[rows].astype(np.int64)

    def _shards_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(B,) rows -> (B,) numbers of the shards that hold them."""
        return np.searchsorted(self._first_row, rows, side="right") - 1

    def _shard_of(self, row: int) -> int:
        return int(self._shards_of(np.array([row]))[0])

    def _buffer(self, count: int) -> NDArray[Any]:
        """An array (B, ...) of the stored type, in the same memory each time: new pages would cost more than reading."""
        buffer: NDArray[Any] | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) != count:
            buffer = self._local.buffer = np.empty((count, *self._info.stored_shape), self._info.dtype)
        return buffer

    def _check_sample(self, row: int, member: NDArray[np.uint8]) -> None:
        if len(member) != self._bytes:
            raise self._damage(row, self._shard_of(row), "the shard ends inside it")
        if member[: len(self._header)].tobytes() != self._header:
            raise self._damage(
                row, self._shard_of(row), f"it is not {self._info.dtype} of shape {self._info.stored_shape}"
            )
        if zlib.crc32(member.tobytes()) != self._crc[row]:
            raise self._damage(
                row, self._shard_of(row), "its bytes are not those that were written (CRC-32 differs)"
            )
        self._checked[row] = True

    def _map(self, shard: int) -> NDArray[np.uint8]:
        """The bytes of a shard, mapped into memory until it is dropped here and no batch is being read from it."""
        mapped = self._maps.get(shard)
        if mapped is not None:
            return mapped
        mapped = self._open_shard(shard)
        with self._lock:
            if shard not in self._maps:
                self._maps[shard] = mapped
                self._mapped_bytes += len(mapped)
            while len(self._maps) > 1 and (
                self._mapped_bytes > self._most_mapped or len(self._maps) > MOST_MAPPED
            ):
                _, dropped = self._maps.popitem(last=False)
                self._mapped_bytes -= len(dropped)
        return mapped

    def _open_shard(self, shard: int) -> NDArray[np.uint8]:
        """Maps a shard's file. Raises ShardError where it cannot be opened or has another size than listed."""
        record = self.shards[shard]
        place = f"{self._store.uri}/{record.name}"
        try:
            if self.cache is not None:
                descriptor = self.cache.open(self._store, record)
            else:
                assert isinstance(self._store, LocalFolder)
                descriptor = os.open(self._store.path(record.name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ShardError(f"{place} is missing.") from error
        except OSError as error:
            raise StorageError(f"{place} cannot be opened: {summarize(error)}.") from error
        try:
            size = os.fstat(descriptor).st_size
            if size != record.bytes:
                raise ShardError(f"{place} has {size} bytes, the manifest lists {record.bytes}.")
            # The mapping outlives the descriptor, so that a set may have more shards than a process may open files.
            return torch.from_file(f"/proc/self/fd/{descriptor}", size=size, dtype=torch.uint8).numpy()
        finally:
            os.close(descriptor)

    def fetch(self, shard: int, stop: Event) -> None:
        """Brings a shard into the cache. Raises StorageError, also once `stop` is set."""
        if self.cache is not None:
            self.cache.fetch(self._store, self.shards[shard], stop)

    def _check_size(self, shard: int) -> None:
        """Raises ShardError where a local shard is missing or has another size than listed."""
        record = self.shards[shard]
        size = self._store.size(record.name)
        if size is None:
            raise ShardError(f"{self._store.uri}/{record.name} is missing.")
        if size != record.bytes:
            raise ShardError(
                f"{self._store.uri}/{record.name} has {size} bytes, the manifest lists {record.bytes}."
            )

    def _damage(self, row: int, shard: int, what: str) -> ShardError:
        """The error that names a sample's shard and key."""
        key = printable(read_index(self._store.uri, ["key"])["key"][row].as_py())
        name = self.shards[shard].name if 0 <= shard < len(self.shards) else INDEX_NAME
        return ShardError(f"{self._store.uri}/{name}, sample {key}: {what}.")


def _block_type(shards: Sequence[ShardRecord]) -> type[np.unsignedinteger[Any]]:
    """The smallest type of a place in a shard in blocks of tar: four bytes for shards of up to 2 TB."""
    return np.uint32 if max((shard.bytes for shard in shards), default=0) // BLOCK < 2**32 else np.uint64
