"""Sources that are tables or archives: Parquet, WebDataset shards, CIFAR-10's own archive."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from soflow_pipelines.dataset_info import INFO_NAME, DatasetInfo
from soflow_pipelines.datasets import LabelledImages
from soflow_pipelines.images import ImageError, decode_image
from soflow_pipelines.sources import CIFAR10_CLASSES, IMAGE_SUFFIXES, ArraySource, SourceError


class ParquetSource:
    """Parquet files with a column of encoded images (binary, or a struct with `bytes`) and one of labels.

    Labels are integers, named by the `huggingface` metadata where there is some, or strings.
    """

    channels = 3
    ignored = 0

    def __init__(
        self, files: Sequence[Path], name: str, image_column: str | None, label_column: str | None
    ) -> None:
        self.name = name
        self.resolution: int | None = None
        self._files = [str(path) for path in files]
        self._local = threading.local()
        tables = [self._file(number) for number in range(len(files))]
        schema = tables[0].schema_arrow
        self._image_column = image_column or _image_column(name, schema)
        label = label_column or next(
            (c for c in schema.names if c in ("label", "labels", "class", "cls")), None
        )
        for column in (self._image_column, label):
            if column is not None and column not in schema.names:
                raise SourceError(f"{name} has no column {column!r}; it has {', '.join(schema.names)}.")
        groups = [
            (n, g, t.metadata.row_group(g).num_rows)
            for n, t in enumerate(tables)
            for g in range(t.num_row_groups)
        ]
        self._groups = [(number, group) for number, group, rows in groups if rows]
        self.block_ends: NDArray[np.int64] | None = np.cumsum(
            [rows for *_, rows in groups if rows], dtype=np.int64
        )
        if not self._groups:
            raise SourceError(f"{name} has no rows.")
        self.labels, self.class_names = self._labels(tables, schema, label)
        sizes = [(path.name, path.stat().st_size) for path in files]
        listed = None if self.labels is None else hashlib.sha256(self.labels.tobytes()).hexdigest()
        self.digest = hashlib.sha256(json.dumps([sizes, listed, self.class_names]).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()

    def __len__(self) -> int:
        assert self.block_ends is not None
        return int(self.block_ends[-1])

    def _file(self, number: int) -> pq.ParquetFile:
        opened = self._local.__dict__.setdefault("files", {})
        if number not in opened:
            try:
                opened[number] = pq.ParquetFile(self._files[number])
            except (OSError, pa.ArrowException) as error:
                raise SourceError(f"{self._files[number]} cannot be read as Parquet: {error}.") from error
        return opened[number]

    def _labels(
        self, tables: Sequence[pq.ParquetFile], schema: pa.Schema, column: str | None
    ) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
        if column is None:
            return None, ()
        values = pa.concat_tables([table.read([column]) for table in tables])[column]
        if values.null_count:
            raise SourceError(f"{self.name}: {values.null_count} rows have no {column}.")
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            names = sorted(set(values.to_pylist()))
            return np.searchsorted(names, values.to_pylist()).astype(np.int64), tuple(names)
        labels = values.to_numpy().astype(np.int64)
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = metadata.get("info", {}).get("features", {}).get(column, {})
        names = feature.get("names") or [str(label) for label in range(int(labels.max()) + 1)]
        if labels.min() < 0 or labels.max() >= len(names):
            raise SourceError(
                f"{self.name}: labels go from {labels.min()} to {labels.max()}, for {len(names)} classes."
            )
        return labels, tuple(names)

    def item_name(self, item: int) -> str:
        group, row = self._place(item)
        number, number_in_file = self._groups[group]
        return f"{Path(self._files[number]).name}, row group {number_in_file}, row {row}"

    def _place(self, item: int) -> tuple[int, int]:
        assert self.block_ends is not None
        group = int(np.searchsorted(self.block_ends, item, side="right"))
        return group, item - (int(self.block_ends[group - 1]) if group else 0)

    def image(self, item: int) -> Image.Image:
        group, row = self._place(item)
        if getattr(self._local, "group", None) != group:
            number, number_in_file = self._groups[group]
            self._local.column = self._file(number).read_row_group(number_in_file, [self._image_column])[0]
            self._local.group = group
        value = self._local.column[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise ImageError(f"{self.item_name(item)}: no image.")
        return decode_image(content, self.item_name(item))


def _image_column(name: str, schema: pa.Schema) -> str:
    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return str(field.name)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return str(field.name)
    raise SourceError(
        f"{name} has no column of images (binary, or a struct with bytes): {', '.join(schema.names)}."
    )


class TarSource:
    """WebDataset shards: `<key>.jpg` (or another image, or a uint8 `.npy`) and `<key>.cls`."""

    block_ends: NDArray[np.int64] | None = None

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name = name
        self.ignored = 0
        self.channels = 3
        self.resolution: int | None = None
        self._files = [str(path) for path in files]
        self._items: list[tuple[int, str, int, int]] = []  # file, member, offset, bytes
        labels: list[int | None] = []
        for number, path in enumerate(files):
            self._scan(number, path, labels)
        if not self._items:
            raise SourceError(f"{name}: the shards hold no images (.jpg, .png, .npy ...).")
        unlabelled = labels.count(None)
        if unlabelled and unlabelled != len(labels):
            member = self._items[labels.index(None)][1]
            raise SourceError(f"{name}: {unlabelled} samples have no .cls, such as {member}.")
        self.labels = None if unlabelled else np.array(labels, np.int64)
        self.class_names = self._class_names(files[0].parent)
        self.digest = hashlib.sha256(json.dumps([self._items, labels]).encode()).hexdigest()

    def _scan(self, number: int, path: Path, labels: list[int | None]) -> None:
        images: dict[str, tuple[str, int, int]] = {}
        classes: dict[str, int] = {}
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    folder, _, base = member.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}"
                    if not member.isfile():
                        continue
                    if f".{suffix.lower()}" in IMAGE_SUFFIXES or suffix == "npy":
                        images[key] = (member.name, member.offset_data, member.size)
                    elif suffix == "cls":
                        opened = archive.extractfile(member)
                        classes[key] = int(opened.read()) if opened is not None else -1
                    else:
                        self.ignored += 1
        except (OSError, tarfile.TarError, ValueError) as error:
            raise SourceError(f"{path} cannot be read as a WebDataset shard: {error}.") from error
        for key, (member_name, offset, size) in images.items():
            self._items.append((number, member_name, offset, size))
            labels.append(classes.get(key))

    def _class_names(self, folder: Path) -> tuple[str, ...]:
        if self.labels is None:
            return ()
        if (folder / INFO_NAME).is_file():
            info = DatasetInfo.from_json((folder / INFO_NAME).read_text())
            if info.kind != "pixels":
                raise SourceError(f"{self.name} holds latents; images are needed.")
            self.channels, self.resolution = info.shape[0], info.shape[1]
            if info.class_names:
                return info.class_names
        return tuple(str(label) for label in range(int(self.labels.max()) + 1))

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        number, member, *_ = self._items[item]
        return f"{Path(self._files[number]).name}: {member}"

    def image(self, item: int) -> Image.Image:
        number, member, offset, size = self._items[item]
        with open(self._files[number], "rb") as file:
            content = os.pread(file.fileno(), size, offset)
        if not member.endswith(".npy"):
            return decode_image(content, self.item_name(item))
        try:
            pixels = np.load(io.BytesIO(content), allow_pickle=False)
            if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
                pixels = pixels.transpose(1, 2, 0)
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
                raise ValueError(f"{pixels.dtype} {pixels.shape} are not the pixels of an image")
        except (ValueError, EOFError) as error:
            raise ImageError(f"{self.item_name(item)}: damaged ({error}).") from error
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        return image if self.channels == 1 else image.convert("RGB")


class Cifar10Archive(ArraySource):
    """`cifar-10-binary.tar.gz` as its authors publish it. The Python version is a pickle and is not read."""

    def __init__(self, path: Path, name: str, split: str) -> None:
        images, labels = [], []
        try:
            with tarfile.open(path) as archive:
                for member in sorted(archive.getmembers(), key=lambda member: member.name):
                    base = Path(member.name).name
                    if not base.endswith(".bin") or base.startswith("data_batch") != (split == "train"):
                        continue
                    opened = archive.extractfile(member)
                    assert opened is not None
                    records = np.frombuffer(opened.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
                    labels.append(records[:, 0].astype(np.int64))
                    images.append(records[:, 1:].reshape(-1, 3, 32, 32))
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            raise SourceError(f"{path} cannot be read: {error}.") from error
        if not images:
            raise SourceError(
                f"{path} holds no {split} batches; give cifar-10-binary.tar.gz, a folder or a zip."
            )
        data = LabelledImages(np.concatenate(images), np.concatenate(labels), CIFAR10_CLASSES)
        super().__init__(name, data)
