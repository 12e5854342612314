"""Full check of a shard set: reads it once and lists every damage."""

from __future__ import annotations

import hashlib
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from soflow_core.failures import printable
from soflow_pipelines.shards.index_checks import count_defects, row_defects
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.tables import (
    INDEX_NAME,
    MANIFEST_NAME,
    UNLABELLED,
    ShardRecord,
    content_digest,
    read_index,
    read_info,
    read_manifest,
)
from soflow_pipelines.shards.writer import BLOCK
from soflow_pipelines.storage.http import WebFolder
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage


@dataclass(frozen=True)
class Damage:
    """One defect of a set: the file, the sample's key where it concerns one, and what is wrong."""

    file: str
    key: str | None
    what: str

    def __str__(self) -> str:
        return printable(f"{self.file}{f', sample {self.key}' if self.key else ''}: {self.what}")


@dataclass
class Member:
    """A member found in a tar file."""

    offset: int
    content_crc: int
    content: bytes | None
    """Only of a label."""
    cut: bool
    """Whether the file ends inside it."""


@dataclass
class Scan:
    """Members and defects found in a shard's bytes."""

    members: dict[str, Member] = field(default_factory=dict)
    damages: list[tuple[str | None, str]] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""


def verify(
    uri: str | Path, threads: int | None = None, on_shard: Callable[[ShardRecord], None] | None = None
) -> list[Damage]:
    """Every damage of a set, in the order of its shards; an empty list for an intact one.

    `on_shard` is called after each shard, from several threads. Raises ShardError where there is no set, or no manifest
    and index to compare with, StorageError where it cannot be read.
    """
    store = open_storage(uri)
    info, records, index = read_info(uri), read_manifest(uri), read_index(uri)
    damages = _check_tables(store, info, records, index)
    rows: list[list[dict[str, Any]]] = [[] for _ in records]
    for row in index.to_pylist():
        if 0 <= row["shard"] < len(records):
            rows[row["shard"]].append(row)

    def check(number: int) -> list[Damage]:
        damages_of_shard = _check_shard(store, info, records[number], rows[number])
        if on_shard is not None:
            on_shard(records[number])
        return damages_of_shard

    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1), "verify") as pool:
        for damages_of_shard in pool.map(check, range(len(records))):
            damages += damages_of_shard
    return damages


def _check_tables(
    store: ObjectStore, info: DatasetInfo, records: list[ShardRecord], index: pa.Table
) -> list[Damage]:
    damages = [Damage(file, None, what) for file, what in count_defects(info, records, len(index))]
    for row, what in row_defects(info, records, index):
        shard = index["shard"][row].as_py()
        file = records[shard].name if 0 <= shard < len(records) else INDEX_NAME
        damages.append(Damage(file, index["key"][row].as_py(), what))
    if content_digest(info, [record.sha256 for record in records]) != info.digest:
        damages.append(
            Damage(MANIFEST_NAME, None, f"its checksums are not those of the digest in {INFO_NAME}")
        )
    if not isinstance(store, WebFolder):
        known = {INFO_NAME, MANIFEST_NAME, INDEX_NAME, *(record.name for record in records)}
        damages += [Damage(name, None, "an extra file") for name in store.names() if name not in known]
    return damages


def _check_shard(
    store: ObjectStore, info: DatasetInfo, record: ShardRecord, rows: list[dict[str, Any]]
) -> list[Damage]:
    try:
        if store.size(record.name) is None:
            return [Damage(record.name, None, "the shard is missing")]
        content = memoryview(store.read(record.name))
    except StorageError as error:
        return [Damage(record.name, None, str(error))]
    scan = scan_shard(content)
    damages = [Damage(record.name, key, what) for key, what in scan.damages]
    if len(rows) != record.samples:
        damages.append(
            Damage(
                record.name,
                None,
                f"{MANIFEST_NAME} counts {record.samples} samples, {INDEX_NAME} {len(rows)}",
            )
        )
    for row in rows:
        damages += [Damage(record.name, row["key"], what) for what in _check_sample(scan, info, row)]
    expected = {f"{row['key']}.{kind}" for row in rows for kind in ("npy", "cls")}
    damages += [
        Damage(record.name, name.partition(".")[0], f"a member {name} that was not written")
        for name in scan.members
        if name not in expected
    ]
    labels = Counter(row["label"] for row in rows if row["label"] != UNLABELLED)
    if dict(labels) != record.label_counts:
        damages.append(Damage(record.name, None, f"{MANIFEST_NAME} has other label counts than {INDEX_NAME}"))
    if scan.bytes != record.bytes:
        damages.append(Damage(record.name, None, f"{scan.bytes} bytes instead of {record.bytes}"))
    elif scan.sha256 != record.sha256 and not damages:
        damages.append(Damage(record.name, None, "bytes between the samples differ (SHA-256)"))
    return damages


def _check_sample(scan: Scan, info: DatasetInfo, row: dict[str, Any]) -> Iterator[str]:
    image = scan.members.get(f"{row['key']}.npy")
    if image is None:
        yield "the .npy is missing"
    elif image.cut:
        yield "cut inside its data"
    elif image.content_crc != row["crc32"]:
        yield "its bytes are not those that were written (CRC-32 differs)"
    elif image.offset != row["offset"]:
        yield f"it lies at byte {image.offset}, {INDEX_NAME} says {row['offset']}"
    if info.classes is None:
        return
    label = scan.members.get(f"{row['key']}.cls")
    if label is None:
        yield "the .cls is missing"
    elif label.cut:
        yield "cut inside its label"
    elif label.content != str(row["label"]).encode():
        yield f"its label is {label.content!r}, {INDEX_NAME} says {row['label']}"


def scan_shard(content: memoryview) -> Scan:
    """Scans a tar file to its end; after a damaged header it continues at the next one that is intact."""
    scan = Scan(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    position, lost, last = 0, False, None
    while position < len(content):
        block = bytes(content[position : position + BLOCK])
        if len(block) < BLOCK:
            scan.damages.append((last, "cut in the header after it"))
            return scan
        if not any(block):
            if any(content[position:]):
                scan.damages.append((last, "data after the end mark"))
            elif len(content) - position != 2 * BLOCK:
                scan.damages.append((last, "the end mark is cut"))
            return scan
        header = _header(block)
        if header is None:
            if not lost:
                scan.damages.append((last, f"a damaged header after it, at byte {position}"))
            lost, position = True, position + BLOCK
            continue
        lost = False
        start, end = position + BLOCK, position + BLOCK + header.size
        data = content[start:end]
        if header.name in scan.members:
            scan.damages.append((header.name.partition(".")[0], f"{header.name} comes twice"))
        scan.members[header.name] = Member(
            offset=start,
            content_crc=zlib.crc32(data),
            content=bytes(data) if header.name.endswith(".cls") else None,
            cut=end > len(content),
        )
        last = header.name.partition(".")[0]
        position = end + -header.size % BLOCK
    scan.damages.append((last, "the shard ends after it, without an end mark"))
    return scan


def _header(block: bytes) -> tarfile.TarInfo | None:
    # A member's data may look like anything: only a block with tar's magic and checksum is a header.
    if block[257:262] != b"ustar":
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    # GNU's numbers may be negative: such a member would lead back to its own header for ever.
    return header if header.size >= 0 else None
