"""Parquet files with a column of encoded images as a source."""

from __future__ import annotations

import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import printable, summarize
from soflow_pipelines.images.decode import ImageError, check_growth, decode_image
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits
from soflow_pipelines.shards.schema import MAX_CLASSES
from soflow_pipelines.shards.tables import check_rows
from soflow_pipelines.sources.label_files import number_labels
from soflow_pipelines.sources.source import OpenedPerThread, SourceError, listing_digest

MOST_OPEN = 8
"""Files that a thread keeps open: published sets have hundreds, and several threads read them."""
NAMED_ROWS = 5
"""Rows that an error names."""
NUMERIC = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating)


class ParquetSource(OpenedPerThread):
    """Parquet files with a column of encoded images (binary, or a struct with `bytes`) and one of labels.

    Labels are strings, or integers whose names are taken from the `huggingface` metadata where there is some.
    Raises SourceError where the files cannot be read or lack a column.
    """

    channels = 3
    ignored = 0

    def __init__(
        self,
        files: Sequence[Path],
        name: str,
        image_column: str | None,
        label_column: str | None,
        unlabelled: bool = False,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.name = name
        self.resolution: int | None = None
        self._files = [str(path) for path in files]
        super().__init__()
        if not files:
            raise SourceError(f"{name} has no rows.")
        schema = self._file(0).schema_arrow
        self._image_column = image_column or _image_column(name, schema)
        self._limits = limits
        label = None if unlabelled else label_column or _label_column(name, schema)
        self.label_origin = None if label is None else f"the column {printable(label)}"
        groups: list[tuple[int, int, int]] = []
        for number, path in enumerate(files):
            table = self._file(number)
            present = table.schema_arrow.names
            for column in (self._image_column, label):
                if column is not None and column not in present:
                    raise SourceError(
                        f"{path} has no column {printable(column)!r}; it has {printable(', '.join(present))}."
                    )
            groups += [(number, g, table.metadata.row_group(g).num_rows) for g in range(table.num_row_groups)]
        self._groups = [(number, group) for number, group, rows in groups if rows]
        self.block_ends: NDArray[np.int64] | None = np.cumsum(
            [rows for *_, rows in groups if rows], dtype=np.int64
        )
        if not self._groups:
            raise SourceError(f"{name} has no rows.")
        self.labels, self.class_names = self._labels(schema, label)
        sizes = [(path.name, path.stat().st_size) for path in files]
        listed = None if self.labels is None else hashlib.sha256(self.labels.tobytes()).hexdigest()
        self.digest = listing_digest([sizes, listed, self.class_names])

    def __len__(self) -> int:
        assert self.block_ends is not None
        return int(self.block_ends[-1])

    def _file(self, number: int, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        """A file, open in this thread until MOST_OPEN others were asked for; columns in `dictionaries` are read as such."""
        opened: OrderedDict[tuple[int, tuple[str, ...]], pq.ParquetFile] = self._local.__dict__.setdefault(
            "files", OrderedDict()
        )
        key = number, tuple(dictionaries)
        if key not in opened:
            try:
                file = pq.ParquetFile(self._files[number], read_dictionary=list(dictionaries) or None)
                check_rows(file.metadata, Path(self._files[number]).stat().st_size)
            except (OSError, ValueError, pa.ArrowException) as error:
                raise SourceError(
                    f"{self._files[number]} cannot be read as Parquet: {printable(summarize(error))}."
                ) from error
            opened[key] = file
            while len(opened) > MOST_OPEN:
                opened.popitem(last=False)[1].close()
        opened.move_to_end(key)
        return opened[key]

    def _image_file(self, number: int) -> pq.ParquetFile:
        """A file for its images.

        Where the images have a dictionary they are read as one: a small file may name an image of many bytes in every row.
        """
        metadata = self._file(number).metadata
        columns = [
            metadata.row_group(group).column(column)
            for group in range(metadata.num_row_groups)
            for column in self._image_columns(metadata)
        ]
        return self._file(number, sorted({c.path_in_schema for c in columns if c.has_dictionary_page}))

    def _image_columns(self, metadata: pq.FileMetaData) -> list[int]:
        """Numbers of the stored columns that the images are in."""
        paths = [metadata.schema.column(column).path for column in range(metadata.num_columns)]
        return [n for n, path in enumerate(paths) if path.split(".")[0] == self._image_column]

    def _check_growth(self, number: int, group: int, name: str) -> None:
        """Raises ImageError for images of a row group that unpack to far more than they take in the file."""
        metadata = self._file(number).metadata
        stored = [metadata.row_group(group).column(n) for n in self._image_columns(metadata)]
        packed = sum(column.total_compressed_size for column in stored)
        check_growth(packed, sum(column.total_uncompressed_size for column in stored), name, self._limits)

    def _labels(
        self, schema: pa.Schema, column: str | None
    ) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
        """Labels (N,) and class names, or None and () where there is no column of labels."""
        if column is None:
            return None, ()
        try:
            parts = [self._file(number).read([column]) for number in range(len(self._files))]
            values = pa.concat_tables(parts)[column]
        except (OSError, ValueError, pa.ArrowException) as error:
            raise SourceError(
                f"{self.name}: the column {printable(column)} cannot be read: {printable(summarize(error))}."
            ) from error
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
        if values.null_count:
            rows = np.flatnonzero(values.is_null().to_numpy())
            named = ", ".join(map(str, rows[:NAMED_ROWS])) + (" ..." if len(rows) > NAMED_ROWS else "")
            raise SourceError(
                f"{self.name}: {len(rows)} rows have no {printable(column)} (rows {named}, counted from 0 over all files)."
            )
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return number_labels(values.to_pylist(), self.name)
        if not any(is_kind(values.type) for is_kind in NUMERIC):
            raise SourceError(
                f"{self.name}: {printable(column)} is {values.type}; labels are integers or strings."
            )
        numbers = values.to_numpy()
        possible = (numbers >= 0) & (numbers < MAX_CLASSES)
        labels = np.where(possible, numbers, 0).astype(np.int64)
        wrong = np.flatnonzero(~possible | (labels != numbers))
        if len(wrong):
            raise SourceError(
                f"{self.name}: {printable(column)} is {numbers[wrong[0]]} in row {wrong[0]}; labels are whole numbers from 0 to "
                f"{MAX_CLASSES - 1}."
            )
        names = _names_in_metadata(schema, column) or [str(n) for n in range(int(labels.max()) + 1)]
        if labels.max() >= len(names):
            raise SourceError(
                f"{self.name}: labels go from {labels.min()} to {labels.max()}, for {len(names)} classes."
            )
        return labels, tuple(names)

    def item_name(self, item: int) -> str:
        """File, row group and row of an image."""
        group, row = self._place(item)
        number, number_in_file = self._groups[group]
        return f"{Path(self._files[number]).name}, row group {number_in_file}, row {row}"

    def _place(self, item: int) -> tuple[int, int]:
        """(index into `_groups`, row in the row group) of an item."""
        assert self.block_ends is not None
        group = int(np.searchsorted(self.block_ends, item, side="right"))
        return group, item - (int(self.block_ends[group - 1]) if group else 0)

    def image(self, item: int) -> Image.Image:
        """An image as RGB. Raises ImageError with its name where it is damaged or missing."""
        group, row = self._place(item)
        if getattr(self._local, "group", None) != group:
            number, number_in_file = self._groups[group]
            self._check_growth(number, number_in_file, self.item_name(item))
            try:
                read = self._image_file(number).read_row_group(number_in_file, [self._image_column])
            except (OSError, ValueError, pa.ArrowException) as error:
                raise ImageError(
                    f"{self.item_name(item)}: its row group cannot be read ({printable(summarize(error))})."
                ) from error
            self._local.column = read[0]
            self._local.group = group
        value = self._local.column[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise ImageError(f"{self.item_name(item)}: no image.")
        return decode_image(content, self.item_name(item), self._limits)


LABEL_NAMES = ("label", "labels", "class", "cls")
"""Names of columns that hold labels, whatever else there is."""
LIKELY_NAME = re.compile(r".*label.*|.*class.*|.*categor.*|targets?|y|digit|species|breed", re.IGNORECASE)


def _label_column(name: str, schema: pa.Schema) -> str | None:
    """The column of labels; None where there is none. Raises SourceError where it is not clear which it is."""
    for column in schema.names:
        if column in LABEL_NAMES:
            return str(column)
    likely = [
        str(field.name)
        for field in schema
        if LIKELY_NAME.fullmatch(field.name)
        and (
            pa.types.is_integer(field.type)
            or pa.types.is_string(field.type)
            or pa.types.is_large_string(field.type)
        )
    ]
    if len(likely) > 1:
        raise SourceError(
            f"{name} has several columns that may be labels, {printable(', '.join(likely))}: choose one with --label-column, or "
            "none with --unlabelled."
        )
    return likely[0] if likely else None


def _image_column(name: str, schema: pa.Schema) -> str:
    """The first column of encoded images. Raises SourceError where there is none."""
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(field.name)
    raise SourceError(
        f"{name} has no column of images (binary, or a struct with bytes): {', '.join(schema.names)}."
    )


def _names_in_metadata(schema: pa.Schema, column: str) -> list[str] | None:
    """The class names that the `datasets` library wrote for a column of labels."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata.get("info", {}).get("features", {}).get(column, {}).get("names")
    except (ValueError, AttributeError, RecursionError):
        return None
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list and len(names) <= MAX_CLASSES else None
