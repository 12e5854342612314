"""Image files in a folder or zip file, with classes by folder; ImageNet's class order where the folders are its synsets."""

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
from soflow_pipelines.sources.source import IMAGE_SUFFIXES, SourceError, listing_digest

SYNSET = re.compile(r"n\d{8}")
"""Name of a class folder of ImageNet."""


class FileSource:
    """Base of sources whose images are files: by path below a root, the first part of which is the class.

    Raises SourceError where there are no images, or images beside the class folders.
    """

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
        self.digest = listing_digest([listed, self.class_names])

    def __len__(self) -> int:
        return len(self._paths)

    def item_name(self, item: int) -> str:
        """Path of an image below the root."""
        return self._paths[item]

    def image(self, item: int) -> Image.Image:
        """An image as RGB. Raises ImageError with its path where it is damaged."""
        return decode_image(self._read(self._paths[item]), self._paths[item])

    def _read(self, path: str) -> bytes:
        """The bytes of a file."""
        raise NotImplementedError


class FolderSource(FileSource):
    """An image folder: `<class>/<anything>.jpg`, or images without classes."""

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
    """An image folder in a zip file, read without unpacking it."""

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
    """Opens a zip file for reading. Raises SourceError."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is not a zip file that can be read: {error}.") from error


def _classes_of(
    name: str, paths: Sequence[str], class_order: Sequence[str] | None
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels (N,) and class names of paths, or None and () where they are in no folders."""
    folders = [path.split("/")[0] if "/" in path else None for path in paths]
    present = sorted({folder for folder in folders if folder is not None})
    if not present:
        return None, ()
    if None in folders:
        raise SourceError(
            f"{name} has images beside its class folders, such as {paths[folders.index(None)]}."
        )
    order, names = _class_order(name, present, class_order)
    number = {folder: label for label, folder in enumerate(order)}
    return np.array([number[folder] for folder in folders if folder], np.int64), tuple(names)


def _class_order(
    name: str, present: Sequence[str], required: Sequence[str] | None
) -> tuple[Sequence[str], Sequence[str]]:
    """Class folders in the order of their labels, and the names of the classes."""
    if required is not None:
        unknown = sorted(set(present) - set(required))
        if unknown:
            raise SourceError(
                f"{name} has the class folder {unknown[0]!r}; the classes are {', '.join(required)}."
            )
        return required, required
    if all(SYNSET.fullmatch(folder) for folder in present):
        synsets, names = imagenet_classes()
        if set(present) <= set(synsets):
            return synsets, names
    return present, present


def imagenet_classes() -> tuple[list[str], list[str]]:
    """The 1,000 synsets of ILSVRC 2012 in the usual class order, and their descriptions."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synsets = info.label_names()
    return synsets, [
        f"{synset} {info.label_name_to_description(synset, detailed=False)}" for synset in synsets
    ]
