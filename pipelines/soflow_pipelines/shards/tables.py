"""soflow_pipelines.shards.tables"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo, ShardError
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage

MANIFEST_NAME = "manifest.parquet"


INDEX_NAME = "index.parquet"


UNLABELLED = -1


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
    """A row of the manifest, with the shard's rows of the index."""

    name: str
    samples: int
    bytes: int
    sha256: str
    label_counts: dict[int, int] = field(default_factory=dict)
    index: pa.Table | None = None


class StagingFolder:
    """A folder for files that are not finished: beside local targets, so that a rename publishes them."""

    def __init__(self, storage: ObjectStore, below: str = "") -> None:
        here = storage.path(below) if isinstance(storage, LocalFolder) else Path(tempfile.gettempdir())
        self._path = here / f".soflow-staging-{secrets.token_hex(4)}"

    def __enter__(self) -> Path:
        self._path.mkdir(parents=True)
        return self._path

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def publish_set(storage: ObjectStore, info: DatasetInfo, records: Sequence[ShardRecord]) -> DatasetInfo:
    """Writes index, manifest and, last, `dataset.json` for shards that are already there."""
    if not records or not sum(record.samples for record in records):
        raise ShardError(f"no samples to write to {storage.uri}")
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
    storage.write(INDEX_NAME, _parquet_bytes(index))
    storage.write(MANIFEST_NAME, _parquet_bytes(manifest))
    finished = replace(
        info,
        samples=sum(record.samples for record in records),
        shards=len(records),
        bytes=sum(record.bytes for record in records),
        digest=content_digest(info, [record.sha256 for record in records]),
    )
    storage.write(INFO_NAME, finished.to_json().encode())
    return finished


def content_digest(info: DatasetInfo, checksums: Sequence[str]) -> str:
    """Of what training sees: the shards' bytes and how they are read; not of where they came from."""
    meaning = [info.kind, info.shape, info.dtype, info.classes, info.scaling, info.shift]
    return "sha256:" + hashlib.sha256(json.dumps([meaning, list(checksums)]).encode()).hexdigest()


def _parquet_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def read_info(uri: str | Path) -> DatasetInfo:
    """ShardError where there is no shard set, or its `dataset.json` cannot be understood."""
    storage = open_storage(uri)
    if storage.size(INFO_NAME) is None:
        raise ShardError(f"{storage.uri} holds no shard set: there is no {INFO_NAME}.")
    try:
        return DatasetInfo.from_json(storage.read(INFO_NAME).decode())
    except (ValueError, TypeError) as error:
        raise ShardError(f"{storage.uri}/{INFO_NAME} cannot be understood: {error}") from error


def read_manifest(uri: str | Path) -> list[ShardRecord]:
    """The shards in order, without their index."""
    return [
        ShardRecord(row["shard"], row["samples"], row["bytes"], row["sha256"], dict(row["label_counts"]))
        for row in read_table(open_storage(uri), MANIFEST_NAME, MANIFEST_SCHEMA).to_pylist()
    ]


def read_index(uri: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A row for each sample, in the order of the shards."""
    return read_table(open_storage(uri), INDEX_NAME, INDEX_SCHEMA, columns)


def read_table(
    storage: ObjectStore, name: str, schema: pa.Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    """ShardError where the table is absent, damaged or another one."""
    wanted = list(columns) if columns is not None else schema.names
    try:
        table = pq.read_table(io.BytesIO(storage.read(name)), columns=wanted)
    except (StorageError, pa.ArrowException, OSError) as error:
        raise ShardError(f"{storage.uri}/{name} cannot be read: {error}") from error
    if table.schema.names != wanted:
        raise ShardError(f"{storage.uri}/{name} has the columns {table.schema.names}, not {wanted}.")
    return table
