"""The interface of an image source, and the source of images that are in memory.

A source lists its images once, in an order that depends on their names alone, and then returns any of them. It can be pickled;
another process opens the files again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import InputError
from soflow_core.registration import Registry
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits


@dataclass(frozen=True)
class LabelledImages:
    """A labelled image data set in memory."""

    images: NDArray[np.uint8]
    """(N, C, H, W), 0 to 255."""
    labels: NDArray[np.int64]
    """(N,), 0 to len(class_names) - 1."""
    class_names: tuple[str, ...]


IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)


class SourceError(InputError):
    """A source that cannot be used. The text names it and says what is wrong."""


class OpenedPerThread:
    """Base of a source whose files are opened once in each thread, and again where it is sent to another process."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


class Source(Protocol):
    """A list of images with labels. Items are numbered from 0."""

    name: str
    """The last part of its path, for messages and `dataset.json`."""
    channels: int
    """3, or 1 for grey images."""
    resolution: int | None
    """Side that all images of the data set have, None where sizes differ."""
    labels: NDArray[np.int64] | None
    """(N,), None where the images have no classes."""
    class_names: tuple[str, ...]
    digest: str
    """Digest of the list: names, sizes and labels."""
    ignored: int
    """Files that were passed over: no images, hidden, or leftovers of another system."""
    label_origin: str | None
    """Where the labels are from, for messages; None where there are none."""
    block_ends: NDArray[np.int64] | None
    """Where given, images are cheap to read only in whole blocks: the number of items up to the end of each block."""

    def __len__(self) -> int:
        """Number of images."""

    def item_name(self, item: int) -> str:
        """Name of an image for messages."""

    def image(self, item: int) -> Image.Image:
        """An image as RGB, or L where `channels` is 1. Raises ImageError with its name where it is damaged."""


class ArraySource:
    """Images in memory as a source."""

    ignored = 0
    label_origin: str | None = "the data set"
    block_ends: NDArray[np.int64] | None = None

    def __init__(self, name: str, data: LabelledImages) -> None:
        self.name = name
        self._images = data.images
        self.channels = data.images.shape[1]
        self.resolution: int | None = data.images.shape[-1]
        self.labels: NDArray[np.int64] | None = data.labels
        self.class_names = data.class_names
        self.digest = hashlib.sha256(data.images.tobytes() + data.labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def item_name(self, item: int) -> str:
        """Name of an image for messages."""
        return f"{self.name}[{item}]"

    def image(self, item: int) -> Image.Image:
        """An image as RGB, or L where `channels` is 1."""
        pixels = self._images[item]
        return Image.fromarray(pixels[0] if self.channels == 1 else pixels.transpose(1, 2, 0))


def listing_digest(listing: Any) -> str:
    """SHA-256 of a list of names, sizes and labels, in hexadecimal."""
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()


@dataclass(frozen=True)
class SourceOptions:
    """What is taken of a source, and what an image may cost."""

    split: str = "train"
    """Which of several splits that a source may have."""
    image_column: str | None = None
    """Of Parquet; None for the first of images."""
    label_column: str | None = None
    """Of Parquet; None for the one that is called so."""
    image_key: str | None = None
    """Extension of the images in WebDataset's tar files, such as `input.jpg`; several with `;`."""
    label_key: str | None = None
    """Extension of the labels in WebDataset's tar files, such as `target.cls` or `json:FIELD`."""
    unlabelled: bool = False
    """Whether labels are left aside."""
    follow_links: bool = True
    """Whether links that lead out of an image folder are followed; else they are refused."""
    limits: ImageLimits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Expected:
    """Shape and classes of data that were not opened yet."""

    shape: tuple[int, ...]
    """(C, H, W)."""
    classes: int | None


class SourceKind(ABC):
    """A data set that is opened by name: `NAME` where it comes with a package, `NAME:PATH` where it lies at a path.

    A frozen dataclass without settings.
    """

    name: str
    """Given by `@register`."""
    expected: ClassVar[Expected | None] = None
    """Shape and classes of a data set that needs no path, which can then be named as `data.source`."""

    @classmethod
    def example(cls, folder: Path) -> Path | None:
        """The path of a small data set of this kind, which it writes into a folder; None where it needs no path.

        The conformance suite opens it.
        """
        del folder
        return None

    @abstractmethod
    def open(self, path: Path, options: SourceOptions) -> Source:
        """The source at a path (`.` where none is given). Raises SourceError where it cannot be used."""


SOURCES: Registry[SourceKind] = Registry("data source", SourceKind, "name")  # type: ignore[type-abstract]
