"""Whether description, manifest and index of a shard set agree, row by row, before a sample is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.tables import INDEX_NAME, MANIFEST_NAME, UNLABELLED, ShardRecord
from soflow_pipelines.shards.writer import BLOCK, npy_header

COLUMNS = ("shard", "label", "offset", "bytes")
"""Columns of the index that the checks read."""
ROWS_AT_ONCE = 2**20
"""Rows that are checked at a time: checking takes ten times the memory of a row."""


def member_bytes(info: DatasetInfo) -> int:
    """Bytes of each sample's .npy file."""
    return len(npy_header(info.dtype, info.stored_shape)) + info.sample_bytes


def count_defects(info: DatasetInfo, records: list[ShardRecord], samples: int) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) for each count in which the tables differ; `samples` is the number of rows of the index."""
    listed = sum(record.samples for record in records)
    for file, what, count in (
        (MANIFEST_NAME, "samples", listed),
        (INDEX_NAME, "samples", samples),
        (MANIFEST_NAME, "shards", len(records)),
        (MANIFEST_NAME, "bytes", sum(record.bytes for record in records)),
    ):
        expected = getattr(info, what)
        if count != expected:
            yield file, f"counts {count} {what}, {INFO_NAME} says {expected}"


def row_defects(info: DatasetInfo, records: list[ShardRecord], index: pa.Table) -> Iterator[tuple[int, str]]:
    """(row of the index, what is wrong) for each row that cannot be a sample of the set, or is not where the writer puts it."""
    yield from RowChecks(info, records).defects(index)


class RowChecks:
    """Checks the index part by part, in its order.

    The order of the rows counts, for the order in which training reads depends on it: that of the shards, and in a shard that
    of the offsets.
    """

    def __init__(self, info: DatasetInfo, records: list[ShardRecord]) -> None:
        self._info = info
        self._lengths = np.array([record.bytes for record in records], np.int64)
        self._before: tuple[int, int] | None = None

    def defects(self, part: pa.Table) -> Iterator[tuple[int, str]]:
        """(row of the part, what is wrong) for each row of the next part that is wrong."""
        for start in range(0, len(part), ROWS_AT_ONCE):
            some = part.slice(start, ROWS_AT_ONCE)
            columns = [some[name].to_numpy().astype(np.int64) for name in COLUMNS]
            before, self._before = self._before, (int(columns[0][-1]), int(columns[2][-1]))
            for row, what in _defects(self._info, self._lengths, columns, before):
                yield start + row, what


def _defects(
    info: DatasetInfo,
    lengths: NDArray[np.int64],
    columns: Sequence[NDArray[np.int64]],
    before: tuple[int, int] | None,
) -> Iterator[tuple[int, str]]:
    """The defects of some rows, of COLUMNS in int64; `before` are shard and offset of the row before them."""
    shard, label, offset, size = columns
    inside = (shard >= 0) & (shard < len(lengths))
    length = np.append(lengths, 0)[np.where(inside, shard, len(lengths))]
    expected = member_bytes(info)
    gap = BLOCK + expected + -expected % BLOCK
    shard_before, offset_before = (shard[0] - 1, 0) if before is None else before
    first = np.diff(shard, prepend=shard_before) != 0
    step = np.diff(offset, prepend=offset_before)
    unlabelled = info.classes is None
    bad_label = label != UNLABELLED if unlabelled else (label < 0) | (label >= (info.classes or 0))
    allowed = (
        "the set has no classes" if unlabelled else f"the set has classes 0 to {(info.classes or 0) - 1}"
    )

    def describe_label(row: int) -> str:
        if label[row] == UNLABELLED:
            return "no label"
        return f"{INDEX_NAME} gives it the label {label[row]}, {allowed}"

    checks: list[tuple[NDArray[Any], Callable[[int], str]]] = [
        (~inside, lambda row: f"{INDEX_NAME} puts it into shard {shard[row]} of {len(lengths)}"),
        (
            np.diff(shard, prepend=shard_before) < 0,
            lambda _: f"{INDEX_NAME} is not in the order of the shards",
        ),
        (size != expected, lambda row: f"{size[row]} bytes listed, a sample has {expected}"),
        (
            inside & ((offset < BLOCK) | (offset % BLOCK != 0) | (offset > length - expected)),
            lambda row: f"{INDEX_NAME} puts it at byte {offset[row]} of {length[row]}",
        ),
        (~first & (step < gap), lambda _: f"{INDEX_NAME} is not in the order of the samples in the shard"),
        (bad_label, describe_label),
    ]
    for is_wrong, describe in checks:
        for row in np.flatnonzero(is_wrong):
            yield int(row), describe(int(row))
