"""Image sets that `soflowctl generate` wrote, as a source: labels and class names are those of their manifest.

A finished set is a folder that holds

    generation.json    the settings that decide the images
    manifest.parquet   a row for each image: index, label, class name, seed, part (the file), key in it, SHA-256 of its bytes
    the images         one PNG file each, or parts `part-000000.tar`, `part-000000.parquet`, or `samples.npz`

The manifest is written last: a set without one is not finished.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import printable, summarize
from soflow_pipelines.images.decode import decode_image
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits
from soflow_pipelines.shards.schema import MAX_CLASSES, is_shard_name
from soflow_pipelines.shards.tables import check_rows
from soflow_pipelines.sources.parquet import ParquetSource
from soflow_pipelines.sources.source import SourceError, listing_digest
from soflow_pipelines.sources.webdataset import TarKeys, TarSource

SETTINGS_NAME = "generation.json"
MANIFEST_NAME = "manifest.parquet"
MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("class_name", pa.string()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


class NumberedImages(Protocol):
    """Images in the order of the manifest."""

    def __len__(self) -> int:
        """Number of images."""

    def item_name(self, item: int) -> str:
        """Name of an image for messages."""

    def image(self, item: int) -> Image.Image:
        """An image as RGB, or L."""


class ImageFiles:
    """Image files of a folder, in a given order."""

    def __init__(self, root: Path, names: Sequence[str], limits: ImageLimits = DEFAULT_LIMITS) -> None:
        self._root, self._names, self._limits = root, list(names), limits

    def __len__(self) -> int:
        return len(self._names)

    def item_name(self, item: int) -> str:
        """Name of the file."""
        return self._names[item]

    def image(self, item: int) -> Image.Image:
        """An image as RGB. Raises ImageError with its name where it is damaged, SourceError where it is not there."""
        try:
            content = (self._root / self._names[item]).read_bytes()
        except OSError as error:
            raise SourceError(
                f"{self._root / self._names[item]} cannot be read: {error.strerror}."
            ) from error
        return decode_image(content, self._names[item], self._limits)


class GeneratedSource:
    """A finished set of generated images."""

    ignored = 0
    label_origin: str | None = None
    block_ends: NDArray[np.int64] | None = None

    def __init__(
        self,
        name: str,
        images: NumberedImages,
        manifest: pa.Table,
        shape: Sequence[int],
        unlabelled: bool = False,
    ) -> None:
        self.name = name
        self._images = images
        self._count = manifest.num_rows
        self.channels = int(shape[0])
        self.resolution: int | None = int(shape[1]) if shape[1] == shape[2] else None
        self.labels: NDArray[np.int64] | None = None
        self.class_names: tuple[str, ...] = ()
        if not unlabelled and not manifest["label"].null_count:
            self.label_origin = MANIFEST_NAME
            self.labels = manifest["label"].to_numpy().astype(np.int64)
            named = dict(zip(self.labels.tolist(), manifest["class_name"].to_pylist(), strict=True))
            count = max(named, default=-1) + 1
            self.class_names = tuple(named.get(label) or str(label) for label in range(count))
        self.digest = listing_digest([manifest["sha256"].to_pylist(), manifest["label"].to_pylist()])

    def __len__(self) -> int:
        return self._count

    def item_name(self, item: int) -> str:
        """Name of an image for messages."""
        return self._images.item_name(item)

    def image(self, item: int) -> Image.Image:
        """An image as RGB, or L where `channels` is 1. Raises ImageError with its name where it is damaged."""
        image = self._images.image(item)
        return image.getchannel(0) if self.channels == 1 and image.mode == "RGB" else image


def open_generated(
    folder: Path, name: str, unlabelled: bool = False, limits: ImageLimits = DEFAULT_LIMITS
) -> GeneratedSource | None:
    """The generated set in a folder; None where there is none.

    Raises SourceError for one that is not finished, has no images, or whose manifest cannot be understood.
    """
    settings = _settings(folder)
    if settings is None:
        return None
    if not (folder / MANIFEST_NAME).is_file():
        raise SourceError(
            f"{folder} holds a set that is not finished: run its `soflowctl generate` again, which makes what is missing."
        )
    manifest = _read_manifest(folder / MANIFEST_NAME)
    images = _images(folder, name, settings["format"], manifest, limits)
    if len(images) != manifest.num_rows:
        raise SourceError(
            f"{folder}: {MANIFEST_NAME} lists {manifest.num_rows} images and the parts hold {len(images)}: "
            f"`soflowctl generate --verify {folder}` says which."
        )
    return GeneratedSource(name, images, manifest, settings["shape"], unlabelled)


def _settings(folder: Path) -> dict[str, Any] | None:
    """The settings of the set; None where there is no set, or one of version 0.1, which is a folder of PNG files."""
    try:
        settings = json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(settings, dict) and {"format", "shape"} <= set(settings)
    if not known:
        return None
    shape = settings["shape"]
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(side, int) for side in shape):
        raise SourceError(f"{folder / SETTINGS_NAME} cannot be understood: shape must be [C, H, W].")
    return settings


def _read_manifest(path: Path) -> pa.Table:
    """The manifest, with its types, plain names and possible labels. Raises SourceError."""
    try:
        file = pq.ParquetFile(path)
        check_rows(file.metadata, path.stat().st_size)
        manifest = file.read()
        if not manifest.schema.equals(MANIFEST_SCHEMA):
            raise pa.ArrowInvalid(f"its columns are {', '.join(manifest.column_names)}")
        parts = set(manifest["part"].to_pylist())
        unsafe = next((part for part in parts if not is_shard_name(part)), None)
        if unsafe is not None:
            raise pa.ArrowInvalid(f"{printable(str(unsafe))} is not the plain name of a file")
        labels = [label for label in manifest["label"].unique().to_pylist() if label is not None]
        if labels and not 0 <= min(labels) <= max(labels) < MAX_CLASSES:
            raise pa.ArrowInvalid(f"labels are {min(labels)} to {max(labels)}")
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be understood: {printable(summarize(error))}.") from error
    return manifest


def _images(folder: Path, name: str, kind: str, manifest: pa.Table, limits: ImageLimits) -> NumberedImages:
    parts = [folder / part for part in dict.fromkeys(manifest["part"].to_pylist())]
    if kind == "png":
        return ImageFiles(folder, manifest["part"].to_pylist(), limits)
    if kind == "webdataset":
        return TarSource(parts, name, TarKeys(unlabelled=True), limits)
    if kind == "parquet":
        return ParquetSource(parts, name, "image", None, unlabelled=True, limits=limits)
    if kind == "npz":
        raise SourceError(f"{folder} holds its images as {folder / 'samples.npz'}: name that file.")
    raise SourceError(
        f"{folder} holds {printable(str(kind))} and no images: generate them in another --format."
    )
