"""Formats that generated samples are stored in: one class for each, which encodes a sample, and writes and reads a file of them.

Equal samples make equal bytes: files hold neither times nor the names of users, and row groups have a size of their own.
"""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from soflow_pipelines.images.encode import encode_png

ROW_GROUP = 64
"""Rows in a row group of a Parquet part."""
RGB = 3


@dataclass(frozen=True)
class Row:
    """A sample as it is stored."""

    index: int
    label: int | None
    content: bytes


AddRow = Callable[[Row], None]


def sample_key(index: int) -> str:
    """The name of a sample in a part."""
    return f"{index:08d}"


class OutputFormat(ABC):
    """How samples are stored. `name` is the value of --format."""

    name: ClassVar[str]
    suffix: ClassVar[str]
    """Of a part, or of the file of a single image."""
    stores_latents: ClassVar[bool] = False
    """Whether it takes samples (C, H, W) float32 as the network makes them, and not uint8 images."""

    def part_name(self, number: int) -> str:
        """The file of a part, relative to the set."""
        return f"part-{number:06d}{self.suffix}"

    def encode(self, sample: Tensor) -> bytes:
        """The bytes of one sample, whose SHA-256 the manifest has."""
        return encode_png(sample)

    @abstractmethod
    def writer(self, path: Path, class_names: Sequence[str]) -> contextlib.AbstractContextManager[AddRow]:
        """Opens a part on this machine; the function that it gives adds a row."""

    @abstractmethod
    def read(self, path: Path) -> Iterator[tuple[str, bytes]]:
        """Key and bytes of each sample of a part on this machine, in order."""


class WebDatasetFormat(OutputFormat):
    """Tar files of `<key>.png` and `<key>.cls`, as any WebDataset reader takes them."""

    name = "webdataset"
    suffix = ".tar"
    member: ClassVar[str] = "png"

    @contextlib.contextmanager
    def writer(self, path: Path, class_names: Sequence[str]) -> Iterator[AddRow]:
        from webdataset import TarWriter

        del class_names
        with path.open("wb") as file, TarWriter(file, mtime=0, encoder=False, compress=False) as tar:

            def add(row: Row) -> None:
                sample: dict[str, Any] = {"__key__": sample_key(row.index), self.member: row.content}
                if row.label is not None:
                    sample["cls"] = str(row.label).encode()
                tar.write(sample)

            yield add

    def read(self, path: Path) -> Iterator[tuple[str, bytes]]:
        with tarfile.open(path) as archive:
            for member in archive:
                stem, _, suffix = member.name.partition(".")
                if suffix == self.member:
                    opened = archive.extractfile(member)
                    yield stem, opened.read() if opened is not None else b""


class LatentsFormat(WebDatasetFormat):
    """Tar files of `<key>.npy`, float32 (C, H, W) as the network makes them, and `<key>.cls`."""

    name = "latents"
    member = "npy"
    stores_latents = True

    def encode(self, sample: Tensor) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, sample.contiguous().numpy(), allow_pickle=False)
        return buffer.getvalue()


class ParquetFormat(OutputFormat):
    """Parquet files with the columns `index`, `image` (PNG bytes, as the `datasets` library stores images) and `label`."""

    name = "parquet"
    suffix = ".parquet"

    @contextlib.contextmanager
    def writer(self, path: Path, class_names: Sequence[str]) -> Iterator[AddRow]:
        rows: list[Row] = []
        opened: list[pq.ParquetWriter] = []

        def flush() -> None:
            if not rows:
                return
            table = _image_table(rows, class_names)
            if not opened:
                # PNG bytes do not become smaller.
                opened.append(pq.ParquetWriter(path, table.schema, compression="none"))
            opened[0].write_table(table)
            rows.clear()

        def add(row: Row) -> None:
            rows.append(row)
            if len(rows) == ROW_GROUP:
                flush()

        try:
            yield add
            flush()
        finally:
            for writer in opened:
                writer.close()

    def read(self, path: Path) -> Iterator[tuple[str, bytes]]:
        for batch in pq.ParquetFile(path).iter_batches(ROW_GROUP, columns=["index", "image"]):
            for row in batch.to_pylist():
                yield sample_key(row["index"]), row["image"]["bytes"]


def _image_table(rows: Sequence[Row], class_names: Sequence[str]) -> pa.Table:
    images = [{"bytes": row.content, "path": f"{sample_key(row.index)}.png"} for row in rows]
    columns: dict[str, pa.Array] = {
        "index": pa.array([row.index for row in rows], pa.int64()),
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    }
    features: dict[str, Any] = {
        "index": {"dtype": "int64", "_type": "Value"},
        "image": {"_type": "Image"},
    }
    if rows[0].label is not None:
        columns["label"] = pa.array([row.label for row in rows], pa.int64())
        features["label"] = (
            {"names": list(class_names), "_type": "ClassLabel"}
            if class_names
            else {"dtype": "int64", "_type": "Value"}
        )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


class PngFormat(OutputFormat):
    """One PNG file for each image, and a grid of the first ones."""

    name = "png"
    suffix = ".png"

    def writer(self, path: Path, class_names: Sequence[str]) -> contextlib.AbstractContextManager[AddRow]:
        raise NotImplementedError("images are files of their own")

    def read(self, path: Path) -> Iterator[tuple[str, bytes]]:
        yield path.stem, path.read_bytes()


class NpzFormat(OutputFormat):
    """`samples.npz` as ADM's evaluator reads it: `arr_0` uint8 (N, H, W, 3), `arr_1` labels. Its parts are raw pixels."""

    name = "npz"
    suffix = ".raw"

    def part_name(self, number: int) -> str:
        """Raw pixels are kept until the file is put together."""
        return f"_parts/pixels-{number:06d}{self.suffix}"

    def encode(self, sample: Tensor) -> bytes:
        return sample.permute(1, 2, 0).expand(-1, -1, RGB).contiguous().numpy().tobytes()

    @contextlib.contextmanager
    def writer(self, path: Path, class_names: Sequence[str]) -> Iterator[AddRow]:
        del class_names
        with path.open("wb") as file:
            yield lambda row: _write(file, row.content)

    def read(self, path: Path) -> Iterator[tuple[str, bytes]]:
        from soflow_pipelines.references.image_sets import NpzImages

        images = NpzImages(path)
        for start in range(0, len(images), ROW_GROUP):
            block = images.read(start, min(start + ROW_GROUP, len(images)))
            for number, image in enumerate(block):
                yield str(start + number), self.encode(image)


def _write(file: BinaryIO, content: bytes) -> None:
    file.write(content)


FORMATS: dict[str, OutputFormat] = {
    each.name: each
    for each in (PngFormat(), WebDatasetFormat(), ParquetFormat(), NpzFormat(), LatentsFormat())
}
"""Every format by name."""
