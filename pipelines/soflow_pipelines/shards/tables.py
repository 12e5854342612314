"""Tables of a shard set: manifest (a row for each shard), index (a row for each sample), and `dataset.json`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from soflow_core.failures import printable, summarize
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo, ShardError
from soflow_pipelines.shards.schema import MAX_CLASSES, MAX_COUNT, is_digest, is_sha256, is_shard_name
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore, read_at_most
from soflow_pipelines.storage.opening import open_storage

MANIFEST_NAME = "manifest.parquet"
INDEX_NAME = "index.parquet"
MOST_BYTES = {INFO_NAME: 2**28, MANIFEST_NAME: 2**30, INDEX_NAME: 2**35}
"""Bytes of each file of a set beyond which it is not read."""
FEW_ROWS = 10**6
FEW_BYTES = 2**27
"""Rows and unpacked bytes of a table that are always read."""
MANY_ROWS = 10**7
ROWS_IN_A_BYTE = 64
"""Rows of another table that are always read, and rows for each byte of a larger one."""
LONGEST_TEXT = 4096
"""Bytes of a key or name in a table."""
SMALLEST_SAMPLE = 1024
"""Bytes of a sample in a tar file: a header and a block."""
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


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A row of the manifest, with the shard's rows of the index where it was just written.

    Raises ValueError for a name that is not a plain file name, a digest that is not one, and impossible counts.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    label_counts: dict[int, int] = field(default_factory=dict)
    index: pa.Table | None = None

    def __post_init__(self) -> None:
        if not is_shard_name(self.name):
            raise ValueError(f"{printable(repr(self.name)[:80])} is not the plain name of a shard")
        if not is_sha256(self.sha256):
            raise ValueError(f"the SHA-256 of {self.name} is not 64 hexadecimal digits")
        if not 0 <= self.bytes <= MAX_COUNT:
            raise ValueError(f"{self.name} has {self.bytes} bytes")
        if not 0 <= self.samples * SMALLEST_SAMPLE <= self.bytes:
            raise ValueError(f"{self.name} has {self.samples} samples in {self.bytes} bytes")
        for label, count in self.label_counts.items():
            if not (0 <= label < MAX_CLASSES and count is not None and 0 <= count <= self.samples):
                raise ValueError(f"{self.name} has {count} samples with the label {label}")


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
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue().to_pybytes()


def read_info(uri: str | Path) -> DatasetInfo:
    """The description of a shard set. Raises ShardError where there is none or it cannot be understood, StorageError."""
    store = open_storage(uri)
    if store.size(INFO_NAME) is None:
        raise ShardError(f"{store.uri} holds no shard set: there is no {INFO_NAME}.")
    try:
        info = DatasetInfo.from_json(read_at_most(store, INFO_NAME, MOST_BYTES[INFO_NAME]).decode())
        if not is_digest(info.digest):
            raise ValueError("its digest is not sha256: and 64 hexadecimal digits")
    except ValueError as error:
        raise ShardError(f"{store.uri}/{INFO_NAME} cannot be understood: {error}.") from error
    return info


def read_manifest(uri: str | Path, *, label_counts: bool = True) -> list[ShardRecord]:
    """The shards in order, without their rows of the index. Raises ShardError, StorageError.

    Without `label_counts`, which training does not read, 100,000 shards of 1,000 classes are not millions of numbers in Python.
    """
    store = open_storage(uri)
    columns = [name for name in MANIFEST_SCHEMA.names if label_counts or name != "label_counts"]
    rows = read_table(store, MANIFEST_NAME, MANIFEST_SCHEMA, columns).to_pylist()
    try:
        records = [
            ShardRecord(
                row["shard"], row["samples"], row["bytes"], row["sha256"], dict(row.get("label_counts", ()))
            )
            for row in rows
        ]
        twice = [name for name, count in Counter(record.name for record in records).items() if count > 1]
        if twice:
            raise ValueError(f"the shard {twice[0]} is listed twice")
    except ValueError as error:
        raise ShardError(f"{store.uri}/{MANIFEST_NAME} cannot be understood: {error}.") from error
    return records


def read_index(uri: str | Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The index: a row for each sample, in the order of the shards. Raises ShardError, StorageError."""
    return read_table(open_storage(uri), INDEX_NAME, INDEX_SCHEMA, columns)


def read_table(
    store: ObjectStore, name: str, schema: pa.Schema, columns: Sequence[str] | None = None
) -> pa.Table:
    """Columns of a Parquet table, with the types of the schema and without nulls.

    Raises ShardError where it is missing, damaged, implausibly large or of another schema, StorageError where it cannot be read.
    """
    table = OpenTable(store, name, schema, columns)
    parts = list(table.parts())
    return pa.concat_tables(parts) if parts else table.schema.empty_table()


class OpenTable:
    """Columns of a Parquet table, with the types of the schema and without nulls, to be read part by part.

    It and `parts` raise ShardError where it is missing, damaged, implausibly large or of another schema, StorageError where it cannot
    be read.
    """

    def __init__(
        self, store: ObjectStore, name: str, schema: pa.Schema, columns: Sequence[str] | None = None
    ) -> None:
        self._place = f"{store.uri}/{name}"
        if store.size(name) is None:
            raise ShardError(f"{self._place} is missing.")
        self.schema = schema if columns is None else pa.schema([schema.field(column) for column in columns])
        self._texts = [column.name for column in self.schema if pa.types.is_string(column.type)]
        with self._understood():
            content = _content(store, name)
            # Arrow's threads would call a Python file, and end the process with SIGABRT where they do so while Python ends.
            source = pa.BufferReader(content)
            opened = pq.ParquetFile(source)
            _check_extent(opened.metadata, content.size)
            _check_columns(opened.schema_arrow, self.schema)
            # Texts stay dictionaries until their lengths are known: a few bytes of a file can repeat a long one very often.
            self._file = pq.ParquetFile(source, metadata=opened.metadata, read_dictionary=self._texts)

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(self._rows_of(group) for group in range(self._file.num_row_groups))

    def parts(self) -> Iterator[pa.Table]:
        """The rows in order, as they were grouped when they were written: a million at a time."""
        for group in range(self._file.num_row_groups):
            with self._understood():
                part = self._checked(self._file.read_row_group(group, columns=self.schema.names))
                if len(part) != self._rows_of(group):
                    raise ValueError(f"a group of {self._rows_of(group)} rows has {len(part)}")
            yield part

    def _rows_of(self, group: int) -> int:
        return int(self._file.metadata.row_group(group).num_rows)

    def _checked(self, table: pa.Table) -> pa.Table:
        # Offsets within bounds, and texts in UTF-8, which reading does not look at.
        table.validate(full=True)
        for text in self._texts:
            _check_texts(table[text])
        table = table.cast(self.schema)
        for column in self.schema:
            if table[column.name].null_count:
                raise ValueError(f"{column.name} is missing in {table[column.name].null_count} rows")
        return table

    @contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, OverflowError, pa.ArrowException) as error:
            raise ShardError(f"{self._place} cannot be understood: {printable(summarize(error))}.") from error


def _content(store: ObjectStore, name: str) -> pa.Buffer:
    """A file's bytes; a local one is mapped, which takes no memory of the process. Raises ValueError where it is too large."""
    if not isinstance(store, LocalFolder):
        return pa.py_buffer(read_at_most(store, name, MOST_BYTES[name]))
    size = store.size(name) or 0
    if size > MOST_BYTES[name]:
        raise ValueError(f"it has more than {MOST_BYTES[name]} bytes")
    with pa.memory_map(str(store.path(name))) as file:
        return file.read_buffer(size)


def _check_extent(metadata: pq.FileMetaData, size: int) -> None:
    """Raises ValueError for a table that would take far more memory than a table of its size that was written here."""
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    unpacked = sum(group.total_byte_size for group in groups)
    # The checksums of different samples do not compress: a row takes at least their four bytes.
    if metadata.num_rows > max(FEW_ROWS, size) or unpacked > max(FEW_BYTES, 64 * size):
        raise ValueError(f"{size} bytes unpack to {metadata.num_rows} rows in {unpacked} bytes")


def check_rows(metadata: pq.FileMetaData, size: int) -> None:
    """Raises ValueError for a table with far more rows than its file of so many bytes has room for.

    Runs of equal values take next to nothing in a file, and eight bytes a row in memory.
    """
    if metadata.num_rows > max(MANY_ROWS, ROWS_IN_A_BYTE * size):
        raise ValueError(f"{size:,} bytes unpack to {metadata.num_rows:,} rows")


def _check_columns(found: pa.Schema, expected: pa.Schema) -> None:
    """Raises ValueError where a column is missing or of another type; texts may come as dictionaries."""
    for column in expected:
        places = found.get_all_field_indices(column.name)
        if len(places) != 1:
            raise ValueError(f"it has the columns {', '.join(found.names)}, and not one {column.name}")
        kind = found.field(places[0]).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind != column.type:
            raise ValueError(f"{column.name} is {kind}, it must be {column.type}")


def _check_texts(column: pa.ChunkedArray) -> None:
    """Raises ValueError where a text of a column is too long."""
    for chunk in column.chunks:
        values = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
        longest = pc.max(pc.binary_length(values)).as_py() or 0
        if longest > LONGEST_TEXT:
            raise ValueError(f"a {column.type} of {longest} bytes is too long")
