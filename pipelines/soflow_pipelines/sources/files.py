"""Image files in a folder or zip file, with classes by folder; ImageNet's class order where the folders are its synsets."""

from __future__ import annotations

import itertools
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import printable, summarize
from soflow_pipelines.images.decode import ImageError, check_growth, check_size, decode_image
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits
from soflow_pipelines.sources.listing import UNREADABLE, is_leftover, list_folder
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
        limits: ImageLimits = DEFAULT_LIMITS,
        unlabelled: bool = False,
    ) -> None:
        listed = sorted(files)
        if not listed:
            raise SourceError(f"{name} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        self.name = name
        self.resolution: int | None = None
        self.ignored = ignored
        self._limits = limits
        self._paths = [path for path, _ in listed]
        self._sizes = np.array([size for _, size in listed], np.int64)
        self.labels, self.class_names = (
            (None, ()) if unlabelled else _classes_of(name, self._paths, class_order)
        )
        self.label_origin = None if self.labels is None else "class folders"
        self.digest = listing_digest([listed, self.class_names])

    def __len__(self) -> int:
        return len(self._paths)

    def item_name(self, item: int) -> str:
        """Path of an image below the root, as it can be shown."""
        return printable(self._paths[item])

    def image(self, item: int) -> Image.Image:
        """An image as RGB. Raises ImageError with its path where it is damaged, too large or no regular file."""
        name, size = self.item_name(item), int(self._sizes[item])
        if size == UNREADABLE:
            raise ImageError(f"{name}: not a file (a link that leads nowhere, a pipe or a device).")
        check_size(size, name, self._limits)
        try:
            content = self._read(self._paths[item])
        except ImageError:
            raise
        except FileNotFoundError as error:
            raise ImageError(f"{name}: it is no longer there.") from error
        return decode_image(content, name, self._limits)

    def _read(self, path: str) -> bytes:
        """The bytes of a file."""
        raise NotImplementedError


class FolderSource(FileSource):
    """An image folder: `<class>/<anything>.jpg`, or images without classes."""

    def __init__(
        self,
        root: Path,
        name: str,
        class_order: Sequence[str] | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        unlabelled: bool = False,
        follow_links: bool = True,
    ) -> None:
        self._root = root
        listing = list_folder(root, follow_links)
        images = [(path, size) for path, size in listing.files if is_image_name(path)]
        ignored = len(listing.files) - len(images) + listing.passed_over
        super().__init__(name, images, ignored, class_order, limits, unlabelled)

    def _read(self, path: str) -> bytes:
        # Not a file that grew, or was replaced by a pipe, after it was listed.
        descriptor = os.open(self._root / path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            return file.read(self._limits.file_bytes + 1)


class ZipSource(FileSource):
    """An image folder in a zip file, read without unpacking it."""

    def __init__(
        self,
        archive: Path,
        prefix: str,
        name: str,
        class_order: Sequence[str] | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        unlabelled: bool = False,
    ) -> None:
        self._archive_path = archive
        self._prefix = prefix
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        entries = [e for e in self._archive.infolist() if e.filename.startswith(prefix) and not e.is_dir()]
        images = [
            e for e in entries if is_image_name(e.filename) and not is_leftover(e.filename[len(prefix) :])
        ]
        _check_members(archive, self._archive.infolist(), images)
        files = [(entry.filename[len(prefix) :], entry.file_size) for entry in images]
        super().__init__(name, files, len(entries) - len(images), class_order, limits, unlabelled)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    @property
    def _archive(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), open_zip(self._archive_path))
        return self._opened[1]

    def _read(self, path: str) -> bytes:
        entry = self._archive.getinfo(self._prefix + path)
        check_growth(entry.compress_size, entry.file_size, printable(path), self._limits)
        try:
            return self._archive.read(entry)
        except MemoryError as error:
            raise ImageError(f"{printable(path)}: there is not enough memory to unpack it.") from error
        except Exception as error:
            # The decompressors have errors of their own.
            raise ImageError(
                f"{printable(path)}: damaged in the zip file ({printable(summarize(error))})."
            ) from error


COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)


def is_image_name(path: str) -> bool:
    """Whether a file's ending is that of an image."""
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def _check_members(
    archive: Path, entries: Sequence[zipfile.ZipInfo], images: Sequence[zipfile.ZipInfo]
) -> None:
    """Raises SourceError for a zip file whose images have no plain names, come twice, overlap or cannot be unpacked."""
    for entry in images:
        parts = entry.filename.split("/")
        if "" in parts or ".." in parts or "\\" in entry.filename:
            raise SourceError(f"{archive}: {printable(entry.filename)} is not a path inside a zip file.")
        if entry.flag_bits & 1:
            raise SourceError(
                f"{archive}: {printable(entry.filename)} is encrypted: unpack the file and give the folder."
            )
        if entry.compress_type not in COMPRESSIONS:
            raise SourceError(
                f"{archive}: {printable(entry.filename)} is compressed in a way that is not read (method {entry.compress_type}): "
                "unpack the file and give the folder."
            )
    name, count = next(iter(Counter(entry.filename for entry in images).most_common(1)), ("", 0))
    if count > 1:
        raise SourceError(f"{archive}: {printable(name)} comes {count} times.")
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    for entry, following in itertools.pairwise(ordered):
        if entry.header_offset + entry.compress_size > following.header_offset:
            raise SourceError(
                f"{archive}: {printable(entry.filename)} and {printable(following.filename)} lie in the same bytes."
            )


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip file for reading. Raises SourceError."""
    try:
        return zipfile.ZipFile(path)
    except Exception as error:
        # A central directory that is damaged may raise anything.
        raise SourceError(
            f"{path} is not a zip file that can be read: {printable(summarize(error))}."
        ) from error


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
            f"{name} has images beside its class folders, such as {printable(paths[folders.index(None)])}."
        )
    order, names = _class_order(name, present, class_order)
    number = {folder: label for label, folder in enumerate(order)}
    return np.array([number[str(folder)] for folder in folders], np.int64), tuple(names)


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
