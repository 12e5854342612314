"""soflow_pipelines.sources.source"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import InputError


@dataclass(frozen=True)
class LabelledImages:
    """A data set that fits in memory."""

    images: NDArray[np.uint8]  # (N, C, H, W), 0 to 255
    labels: NDArray[np.int64]  # (N,), 0 to len(class_names) - 1
    class_names: tuple[str, ...]


IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)


class SourceError(InputError):
    """A source that cannot be used. The text names it and says what is wrong."""


class Source(Protocol):
    """A list of images with labels. Items are numbered from 0."""

    name: str
    channels: int
    resolution: int | None  # the side that all images have by nature, None where sizes differ
    labels: NDArray[np.int64] | None
    class_names: tuple[str, ...]
    digest: str  # of the list: names, sizes and labels
    ignored: int  # files beside the images that are none
    block_ends: NDArray[np.int64] | None  # items between two ends are cheap only when read together

    def __len__(self) -> int: ...

    def item_name(self, item: int) -> str: ...

    def image(self, item: int) -> Image.Image:
        """RGB, or L where `channels` is 1. ImageError naming a damaged one."""


class ArraySource:
    """Images that are in memory."""

    ignored = 0
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
        return f"{self.name}[{item}]"

    def image(self, item: int) -> Image.Image:
        pixels = self._images[item]
        return Image.fromarray(pixels[0] if self.channels == 1 else pixels.transpose(1, 2, 0))


def _digest(listing: Any) -> str:
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
