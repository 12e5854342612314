"""Tables of a shard set: manifest (a row for each shard), index (a row for each sample), and `dataset.json`."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo, ShardError
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage

MANIFEST_NAME = "manifest.parquet"
INDEX_NAME = "index.parquet"
UNLABELLED = -1
"""The label that the index has for samples without one."""
INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("key", pa.string()),
        ("label", pa.int32()),
        ("offset", pa.int64()),
        ("bytes", pa.int32()),
        ("crc32", pa.uint32()),
    ]
)
MANIFEST_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("label_counts", pa.map_(pa.int32(), pa.int64())),
    ]
)


@dataclass(frozen=True)
class ShardRecord:
    """A row of the manifest, with the shard's rows of the index where it was just written."""

    name: str
    samples: int
    bytes: int
    sha256: str
    label_counts: dict[int, int] = field(default_factory=dict)
    index: pa.Table | None = None


def publish_set(store: ObjectStore, info: DatasetInfo, records: Sequence[ShardRecord]) -> DatasetInfo:
    """Writes index, manifest and, last, `dataset.json` for shards that are already in the store; returns the finished description.

    Raises ShardError where there are no samples, StorageError where the store cannot be written.
    """
    if not records or not sum(record.samples for record in records):
        raise ShardError(f"no samples to write to {store.uri}")
    index = pa.concat_tables([record.index for record in records if record.index is not None])
    manifest = pa.Table.from_pylist(
        [
            {
                "shard": record.name,
                "samples": record.samples,
                "bytes": record.bytes,
                "sha256": record.sha256,
                "label_counts": list(record.label_counts.items()),
            }
            for record in records
        ],
        schema=MANIFEST_SCHEMA,
    )
    store.write(INDEX_NAME, _parquet_bytes(index))
    store.write(MANIFEST_NAME, _parquet_bytes(manifest))
    finished = replace(
        info,
        samples=sum(record.samples for record in records),
        shards=len(records),
        bytes=sum(record.bytes for record in records),
        digest=content_digest(info, [record.sha256 for record in records]),
    )
    store.write(INFO_NAME, finished.to_json().encode())
    return finished


def content_digest(info: DatasetInfo, checksums: Sequence[str]) -> str:
    """Digest of what training reads: the shards' bytes and how they are interpreted, not where they came from."""
    interpretation = [info.kind, info.shape, info.dtype, info.classes, info.scaling, info.shift]
    return "sha256:" + hashlib.sha256(json.dumps([interpretation, list(checksums)]).encode()).hexdigest()


def _parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_info(uri: str | Path) -> DatasetInfo:
    """The description of a shard set. Raises ShardError where there is none or it cannot be understood, StorageError."""
    store = open_storage(uri)
    if store.size(INFO_NAME) is None:
        raise ShardError(f"{store.uri} holds no shard set: there is no {INFO_NAME}.")
    try:
        return DatasetInfo.from_json(store.read(INFO_NAME).decode())
    except (ValueError, TypeError) as error:
        raise ShardError(f"{store.uri}/{INFO_NAME} cannot be understood: {error}") from error


def read_manifest(uri: str | Path) -> list[ShardRecord]:
    """The shards in order, without their rows of the index. Raises ShardError."""
    return [
        ShardRecord(row["shard"], row["samples"], row["bytes"], row["sha256"], dict(row["label_counts"]))
        for row in read_table(open_storage(uri), MANIFEST_NAME, MANIFEST_SCHEMA).to_pylist()
    ]


def read_index(uri: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The index: a row for each sample, in the order of the shards. Raises ShardError."""
    return read_table(open_storage(uri), INDEX_NAME, INDEX_SCHEMA, columns)


def read_table(
    store: ObjectStore, name: str, schema: pa.Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    """Columns of a Parquet table. Raises ShardError where it is missing, damaged or has other columns."""
    names = list(columns) if columns is not None else schema.names
    try:
        table = pq.read_table(io.BytesIO(store.read(name)), columns=names)
    except (StorageError, pa.ArrowException, OSError) as error:
        raise ShardError(f"{store.uri}/{name} cannot be read: {error}") from error
    if table.schema.names != names:
        raise ShardError(f"{store.uri}/{name} has the columns {table.schema.names}, not {names}.")
    return table
