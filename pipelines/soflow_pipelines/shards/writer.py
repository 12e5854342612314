"""Writes shard sets: WebDataset tar files, an index of offsets, a manifest and `dataset.json`.

A set is a folder or URI that holds

    shard-000000.tar ...   <key>.npy and <key>.cls, readable by any WebDataset reader, byte-deterministic
    index.parquet          a row for each sample: shard, key, label, offset and bytes of the .npy, its CRC-32
    manifest.parquet       a row for each shard: name, samples, bytes, SHA-256, label counts
    dataset.json           the description of the set; written last, so that a set is complete or absent
"""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo, ShardError
from soflow_pipelines.shards.tables import INDEX_SCHEMA, UNLABELLED, ShardRecord, publish_set
from soflow_pipelines.storage.object_store import ObjectStore
from soflow_pipelines.storage.opening import WritableFile, open_storage, staged_file, staging_folder

SHARD_BYTES = 256 * 2**20
BLOCK = 512
"""Bytes to which tar pads headers and members."""


@dataclass(frozen=True)
class Sample:
    """One sample to store: uint8 pixels (C, H, W), or posterior mean and std (2C, H, W) of latents."""

    key: str
    array: NDArray[Any]
    label: int | None = None


def shard_name(number: int) -> str:
    """The file name of a shard."""
    return f"shard-{number:06d}.tar"


def npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """The bytes before the data in an .npy file of version 1.0; the same for every sample of a set."""
    buffer = io.BytesIO()
    facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()


class ShardWriter:
    """Writes the samples of one tar file: USTAR, every time and owner zero, so that equal samples make equal bytes."""

    def __init__(self, file: WritableFile, number: int, info: DatasetInfo) -> None:
        self._file = file
        self._number = number
        self._info = info
        self._sha = hashlib.sha256()
        self._rows: list[tuple[int, str, int, int, int, int]] = []
        self._bytes = 0
        self._keys: set[str] = set()
        self._npy_header = npy_header(info.dtype, info.stored_shape)
        self._npy_checksum = zlib.crc32(self._npy_header)

    def add(self, sample: Sample) -> None:
        """Appends a sample. Raises ValueError where it does not fit `dataset.json`, or its key was added before."""
        self._check(sample)
        # The array's own memory: a copy of it beside its header would cost as much as writing it.
        content = np.ascontiguousarray(sample.array).data.cast("B")
        size = len(self._npy_header) + len(content)
        offset = self._member(f"{sample.key}.npy", size, self._npy_header, content)
        label = UNLABELLED
        if sample.label is not None:
            label = int(sample.label)
            text = str(label).encode()
            self._member(f"{sample.key}.cls", len(text), text)
        checksum = zlib.crc32(content, self._npy_checksum)
        self._rows.append((self._number, sample.key, label, offset, size, checksum))

    def _check(self, sample: Sample) -> None:
        info = self._info
        name = f"sample {sample.key!r}"
        if not sample.key or "." in sample.key or "/" in sample.key:
            raise ValueError(f"{name}: a key has no dot and no slash, for readers split names there")
        if sample.key in self._keys:
            raise ValueError(f"{name} comes twice")
        if sample.array.shape != info.stored_shape or sample.array.dtype != np.dtype(info.dtype):
            raise ValueError(
                f"{name} is {sample.array.dtype} {sample.array.shape}, "
                f"the set holds {info.dtype} {info.stored_shape}"
            )
        if (sample.label is None) != (info.classes is None):
            raise ValueError(f"{name} has label {sample.label}, the set has classes {info.classes}")
        if sample.label is not None and info.classes and not 0 <= sample.label < info.classes:
            raise ValueError(f"{name} has label {sample.label}, the set has classes 0 to {info.classes - 1}")
        self._keys.add(sample.key)

    def _member(self, name: str, size: int, *content: bytes | memoryview) -> int:
        """Writes a file of `size` bytes, given in parts; returns its offset in the tar file."""
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = size, 0o644, 0
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self._bytes
        for part in content:
            self._write(part)
        self._write(bytes(-size % BLOCK))
        return offset

    def _write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._sha.update(content)
        self._bytes += len(content)

    def finish(self) -> ShardRecord:
        """Writes the end of the tar file and returns the shard's row of the manifest and its rows of the index."""
        self._write(bytes(2 * BLOCK))
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(INDEX_SCHEMA)
        arrays = [pa.array(c, field.type) for c, field in zip(columns, INDEX_SCHEMA, strict=True)]
        labels = Counter(row[2] for row in self._rows if row[2] != UNLABELLED)
        return ShardRecord(
            name=shard_name(self._number),
            samples=len(self._rows),
            bytes=self._bytes,
            sha256=self._sha.hexdigest(),
            label_counts=dict(sorted(labels.items())),
            index=pa.table(arrays, schema=INDEX_SCHEMA),
        )


@contextmanager
def open_shard(store: ObjectStore, path: Path, number: int, info: DatasetInfo) -> Iterator[ShardWriter]:
    """Opens a file in a staging folder of a store for one shard, which takes its name when the block ends without an exception.

    Call `finish` in the block.
    """
    with staged_file(store, path) as file:
        yield ShardWriter(file, number, info)


def samples_per_shard(info: DatasetInfo, samples: int, shard_bytes: int = SHARD_BYTES) -> int:
    """How many samples fill `shard_bytes`; a small set is cut into eight shards, so that several workers can share it."""
    stored = int(np.prod(info.stored_shape)) * np.dtype(info.dtype).itemsize + 128
    member = BLOCK + -(-stored // BLOCK) * BLOCK + (2 * BLOCK if info.classes is not None else 0)
    return max(1, min(shard_bytes // member, -(-samples // 8)))


def write_shards(
    samples: Iterable[Sample],
    out: str | Path,
    info: DatasetInfo,
    per_shard: int | None = None,
    total: int | None = None,
) -> DatasetInfo:
    """Writes a whole set, in the order of `samples`, and returns its finished description.

    `per_shard` defaults to what fills 256 MB; where the `total` is known, a small set is cut into eight shards.
    Raises ShardError where there is a set already or no samples, StorageError, ValueError for a sample that does not fit.
    """
    store = open_storage(out)
    if store.size(INFO_NAME) is not None:
        raise ShardError(f"{store.uri} already holds a shard set; write to another folder or remove it.")
    if per_shard is None:
        per_shard = samples_per_shard(info, total if total is not None else 2**62)
    remaining = iter(samples)
    records: list[ShardRecord] = []
    with staging_folder(store) as staging:
        while chunk := list(islice(remaining, per_shard)):
            number = len(records)
            local = staging / shard_name(number)
            with open_shard(store, local, number, info) as writer:
                for sample in chunk:
                    writer.add(sample)
                record = writer.finish()
            store.publish(record.name, local)
            records.append(record)
    return publish_set(store, info, records)
