"""Tar files in WebDataset's format as a source, also shard sets of pixels."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_pipelines.images.decode import ImageError, decode_image
from soflow_pipelines.shards.info import INFO_NAME
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.source import IMAGE_SUFFIXES, SourceError, listing_digest


class TarSource:
    """WebDataset shards: `<key>.jpg` (or another image, or a uint8 `.npy`) and `<key>.cls`.

    Raises SourceError where they cannot be read, hold no images, or only some of these have labels, and ShardError for a
    `dataset.json` that cannot be understood.
    """

    block_ends: NDArray[np.int64] | None = None

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name = name
        self.ignored = 0
        self.channels = 3
        self.resolution: int | None = None
        self._files = [str(path) for path in files]
        self._items: list[tuple[int, str, int, int]] = []
        """File, name of the member, its offset and its bytes."""
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
        self.digest = listing_digest([self._items, labels])

    def _scan(self, number: int, path: Path, labels: list[int | None]) -> None:
        """Lists the images of one file, and appends their labels to `labels`."""
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
        """Names from `dataset.json` where there is one, which also has channels and resolution; else numbers."""
        if self.labels is None:
            return ()
        if (folder / INFO_NAME).is_file():
            info = read_info(folder)
            if info.kind != "pixels":
                raise SourceError(f"{self.name} holds latents; images are needed.")
            self.channels, self.resolution = info.shape[0], info.shape[1]
            if info.class_names:
                return info.class_names
        return tuple(str(label) for label in range(int(self.labels.max()) + 1))

    def __len__(self) -> int:
        return len(self._items)

    def item_name(self, item: int) -> str:
        """File and member of an image."""
        number, member, *_ = self._items[item]
        return f"{Path(self._files[number]).name}: {member}"

    def image(self, item: int) -> Image.Image:
        """An image as RGB, or L where `channels` is 1. Raises ImageError with its name where it is damaged."""
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
