"""Where images come from: folders, zip files, ImageNet's tree, Parquet, WebDataset shards, digits, CIFAR-10.

A source lists its images once, in an order that depends on their names alone, and then gives any of them.
It can be sent to another process, which opens the files again.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_pipelines.images.decode import ImageError, decode_image
from soflow_pipelines.sources.source import IMAGE_SUFFIXES, SourceError, _digest

SYNSET = re.compile(r"n\d{8}")


class FileSource:
    """Images by path below a root; the first part of the path is the class."""

    channels = 3
    block_ends: NDArray[np.int64] | None = None

    def __init__(
        self,
        name: str,
        files: Iterable[tuple[str, int]],
        ignored: int,
        class_order: Sequence[str] | None = None,
    ) -> None:
        listed = sorted(files)
        if not listed:
            raise SourceError(f"{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        self.name = name
        self.resolution: int | None = None
        self.ignored = ignored
        self._paths = [path for path, _ in listed]
        self.labels, self.class_names = _classes_of(name, self._paths, class_order)
        self.digest = _digest([listed, self.class_names])

    def __len__(self) -> int:
        return len(self._paths)

    def item_name(self, item: int) -> str:
        return self._paths[item]

    def image(self, item: int) -> Image.Image:
        return decode_image(self._read(self._paths[item]), self._paths[item])

    def _read(self, path: str) -> bytes:
        raise NotImplementedError


class FolderSource(FileSource):
    """An image folder: `<class>/<anything>.jpg`, or images of no class."""

    def __init__(self, root: Path, name: str, class_order: Sequence[str] | None = None) -> None:
        self._root = root
        files, ignored = [], 0
        for folder, _, names in os.walk(root, followlinks=True):
            for file in names:
                path = Path(folder, file)
                if path.suffix.lower() in IMAGE_SUFFIXES:
                    files.append((path.relative_to(root).as_posix(), path.stat().st_size))
                else:
                    ignored += 1
        super().__init__(name, files, ignored, class_order)

    def _read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()


class ZipSource(FileSource):
    """An image folder in a zip file, which is read without unpacking it."""

    def __init__(
        self, archive: Path, prefix: str, name: str, class_order: Sequence[str] | None = None
    ) -> None:
        self._archive_path = archive
        self._prefix = prefix
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        entries = [e for e in self._archive.infolist() if e.filename.startswith(prefix) and not e.is_dir()]
        images = [e for e in entries if Path(e.filename).suffix.lower() in IMAGE_SUFFIXES]
        files = [(entry.filename[len(prefix) :], entry.file_size) for entry in images]
        super().__init__(name, files, len(entries) - len(images), class_order)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), open_zip(self._archive_path))
        return self._opened[1]

    def _read(self, path: str) -> bytes:
        try:
            return self._archive.read(self._prefix + path)
        except zipfile.BadZipFile as error:
            raise ImageError(f"{path}: damaged in the zip file ({error}).") from error


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is not a zip file that can be read: {error}.") from error


def _classes_of(
    name: str, paths: Sequence[str], class_order: Sequence[str] | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels (N,) and class names of paths; ImageNet's where the folders are its synsets."""
    folders = [path.split("/")[0] if "/" in path else None for path in paths]
    found = sorted({folder for folder in folders if folder is not None})
    if not found:
        return None, ()
    if None in folders:
        raise SourceError(
            f"{name} has images beside its class folders, such as {paths[folders.index(None)]}."
        )
    order, names = _class_order(name, found, class_order)
    number = {folder: label for label, folder in enumerate(order)}
    return np.array([number[folder] for folder in folders if folder], np.int64), tuple(names)


def _class_order(
    name: str, found: Sequence[str], wanted: Sequence[str] | None
) -> tuple[Sequence[str], Sequence[str]]:
    if wanted is not None:
        strange = sorted(set(found) - set(wanted))
        if strange:
            raise SourceError(
                f"{name} has the class folder {strange[0]!r}; the classes are {', '.join(wanted)}."
            )
        return wanted, wanted
    if all(SYNSET.fullmatch(folder) for folder in found):
        synsets, names = imagenet_classes()
        if set(found) <= set(synsets):
            return synsets, names
    return found, found


def imagenet_classes() -> tuple[list[str], list[str]]:
    """The 1,000 synsets of ILSVRC 2012 in the usual class order, and their names in words."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    return synsets, [
        f"{synset} {info.label_name_to_description(synset, detailed=False)}" for synset in synsets
    ]
