"""Labels of generated images: by a rule of the image's number, or from a table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from soflow_core.failures import printable, summarize
from soflow_core.samplers.noise import sample_labels
from soflow_pipelines.shards.tables import check_rows
from soflow_platform.errors import UserError

BALANCED, UNIFORM = "balanced", "uniform"
LABEL_COLUMN = "label"
NAMED_ROWS = 10
"""Broken rows of a table that an error lists."""


@dataclass(frozen=True)
class RejectedRow:
    """A row of a table that no image can be made for."""

    row: int
    value: str
    """The label as it stands in the table; empty where there is none."""
    reason: str


@dataclass(frozen=True)
class ChosenLabels:
    """Which images are made, and of which class."""

    indices: NDArray[np.int64]
    """(N,) numbers of the images, ascending; the rows of a table that are left out are missing."""
    labels: NDArray[np.int64] | None
    """(N,); None for an unconditional network."""
    rule: str
    """The rule, or the digest of the table, as the settings of a set record it."""
    requested: int
    """Images asked for, with those that are left out."""
    rejected: tuple[RejectedRow, ...] = ()


def labels_by_rule(rule: str | None, num: int, classes: int | None, seed: int) -> ChosenLabels:
    """`balanced` (every class in turn, the default), `uniform` (drawn for each image), or labels such as `0,1,2`, in turn.

    Raises UserError for another rule, labels that the network does not know, and any rule for an unconditional network.
    """
    indices = np.arange(num)
    if classes is None:
        if rule is not None:
            raise UserError("this network is unconditional: leave labels out.")
        return ChosenLabels(indices, None, "none", num)
    rule = rule or BALANCED
    if rule in (BALANCED, UNIFORM):
        labels = sample_labels(seed, range(num), classes, balanced=rule == BALANCED).numpy()
        return ChosenLabels(indices, labels, rule, num)
    listed = _listed(rule, classes)
    labels = np.array(listed, np.int64)[indices % len(listed)]
    return ChosenLabels(indices, labels, ",".join(map(str, listed)), num)


def _listed(text: str, classes: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not word.isdigit()]
    if wrong:
        raise UserError(
            f"labels {text!r}: {wrong[0]!r} is no label; give {BALANCED}, {UNIFORM} or numbers such as 0,1,2."
        )
    numbers = [int(word) for word in words]
    unknown = [number for number in numbers if number >= classes]
    if unknown:
        raise UserError(
            f"label {unknown[0]} is not one of the network's {classes} classes (0 to {classes - 1})."
        )
    return numbers


def labels_of_table(path: Path, classes: int | None, skip_bad: bool) -> ChosenLabels:
    """Image i gets the label in row i of a Parquet file's column `label`.

    With `skip_bad` rows without a label that the network knows are left out, else they raise UserError with their numbers; the
    other images stay the same. Raises UserError too where the file is no such table, or the network is unconditional.
    """
    if classes is None:
        raise UserError("this network is unconditional: it takes no table of labels, give --num.")
    column = _read_column(path)
    values = column.to_pylist()
    rejected = tuple(_rejected(values, classes))
    if rejected and not skip_bad:
        raise UserError(_describe(path, rejected))
    broken = {each.row for each in rejected}
    indices = np.array([row for row in range(len(values)) if row not in broken], np.int64)
    if not len(indices):
        raise UserError(f"{path} has no row with a label from 0 to {classes - 1}.")
    labels = np.array([values[row] for row in indices], np.int64)
    digest = hashlib.sha256(repr(values).encode()).hexdigest()
    return ChosenLabels(indices, labels, f"table {digest[:16]}", len(values), rejected)


def _read_column(path: Path) -> pa.ChunkedArray:
    try:
        file = pq.ParquetFile(path)
        check_rows(file.metadata, path.stat().st_size)
        names = file.schema_arrow.names
        column = file.read([LABEL_COLUMN])[LABEL_COLUMN] if LABEL_COLUMN in names else None
    except FileNotFoundError:
        raise UserError(f"there is no table {path}.") from None
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read as Parquet: {printable(summarize(error))}.") from None
    if column is None:
        raise UserError(f"{path} has no column `{LABEL_COLUMN}`; it has {printable(', '.join(names))}.")
    if not pa.types.is_integer(column.type):
        raise UserError(f"{path}: the column `{LABEL_COLUMN}` is {column.type}; labels are integers.")
    return column


def _rejected(values: Sequence[int | None], classes: int) -> list[RejectedRow]:
    rejected = []
    for row, value in enumerate(values):
        if value is None:
            rejected.append(RejectedRow(row, "", "no label"))
        elif not 0 <= value < classes:
            rejected.append(RejectedRow(row, str(value), f"labels are 0 to {classes - 1}"))
    return rejected


def _describe(path: Path, rejected: Sequence[RejectedRow]) -> str:
    named = "; ".join(
        f"row {each.row}: {f'label {each.value}, ' if each.value else ''}{each.reason}"
        for each in rejected[:NAMED_ROWS]
    )
    more = f"; and {len(rejected) - NAMED_ROWS} more" if len(rejected) > NAMED_ROWS else ""
    return f"{path} has {len(rejected)} rows that cannot be used ({named}{more}): mend them, or pass --skip-bad to leave them out."


def rejected_table(rejected: Sequence[RejectedRow]) -> pa.Table:
    """The rows that are left out, as they are kept beside the images."""
    return pa.table(
        {
            "row": pa.array([each.row for each in rejected], pa.int64()),
            "label": pa.array([each.value or None for each in rejected], pa.string()),
            "reason": pa.array([each.reason for each in rejected], pa.string()),
        }
    )
