"""Images to a grid, to PNG, to a folder of PNG files. Torch is not imported; tensors are taken as they come."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_pipelines.storage.files import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

Images: TypeAlias = Union["Tensor", NDArray[np.uint8]]
COMPRESSION = 3
"""zlib's level. Photographs of 256 x 256 take half the time of the usual 6 and 4% more bytes."""


def image_grid(images: Images, columns: int = 8, padding: int = 2, enlarge: int = 1) -> NDArray[np.uint8]:
    """uint8 (N, C, H, W), C 1 or 3 -> one RGB image (H', W', 3), row by row on white.

    `enlarge` repeats each pixel, so that 8 x 8 digits can be seen.
    """
    pictures = _as_rgb(images)
    count, height, width, _ = pictures.shape
    if not count or columns < 1 or padding < 0 or enlarge < 1:
        raise ValueError(
            "a grid needs an image, a column, padding of 0 or more and an enlargement of 1 or more"
        )
    columns = min(columns, count)
    rows = -(-count // columns)
    height, width = height * enlarge, width * enlarge
    grid = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, 3), 255, np.uint8
    )
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top = padding + row * (height + padding)
        left = padding + column * (width + padding)
        grid[top : top + height, left : left + width] = picture.repeat(enlarge, 0).repeat(enlarge, 1)
    return grid


def _as_rgb(images: Images) -> NDArray[np.uint8]:
    array = _as_array(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3):
        raise ValueError(f"images are uint8 (N, 1 or 3, H, W), these are {array.dtype} {array.shape}")
    return np.broadcast_to(array.transpose(0, 2, 3, 1), (*array.shape[:1], *array.shape[2:], 3))


def _as_array(images: Images) -> NDArray[np.uint8]:
    return images if isinstance(images, np.ndarray) else images.detach().cpu().numpy()


def encode_png(image: Images) -> bytes:
    """One uint8 image, (C, H, W) or (H, W, C) with C 1 or 3, or (H, W) -> the bytes of a PNG file."""
    array = _as_array(image)
    if array.dtype != np.uint8:
        raise ValueError(f"a PNG takes uint8 pixels, these are {array.dtype}")
    if array.ndim == 3 and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(f"{array.shape} is not the shape of one grey or RGB image")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format="PNG", compress_level=COMPRESSION)
    return buffer.getvalue()


def write_folder(
    images: Images, folder: Path, names: Sequence[str] | None = None, start: int = 0
) -> list[Path]:
    """Writes uint8 (N, C, H, W) as `<name>.png`, or as numbers of eight digits from `start` on; returns the paths.

    The folder is an image set that `soflowctl evaluate` takes. Each file is written whole. Raises OSError.
    """
    if names is None:
        names = [f"{start + index:08d}" for index in range(len(images))]
    if len(names) != len(images):
        raise ValueError(f"{len(names)} names for {len(images)} images")
    paths = [Path(folder) / f"{name}.png" for name in names]
    for path, image in zip(paths, images, strict=True):
        write_bytes(path, encode_png(image))
    return paths
