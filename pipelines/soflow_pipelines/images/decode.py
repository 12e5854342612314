"""Encoded images to RGB, the centre crop, and arrays."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from soflow_core.failures import InputError


class ImageError(InputError):
    """An image that cannot be used. The text names it and says what is wrong."""


def decode_image(content: bytes, name: str) -> Image.Image:
    """An encoded image -> RGB, upright. Raises ImageError with its name where it is damaged or no image.

    Grey, palette and CMYK images become RGB, 16-bit grey is scaled to 8 bits, transparent pixels are blended
    with white, and an EXIF orientation is applied.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image that can be read.") from error
    except (OSError, ValueError, SyntaxError, IndexError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: damaged ({error}).") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(
            f"{name}: pixels are floating-point numbers, and it is not known which number is white."
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        foreground = image.convert("RGBA")
        white = Image.new("RGBA", foreground.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, foreground).convert("RGB")
    return image.convert("RGB")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square crop of the ADM evaluation (Dhariwal and Nichol, 2021): (size, size).

    The image is halved by box averaging while its shorter side is at least twice the target, scaled
    bicubically until the shorter side is the target, and cut in the middle.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """A grey or RGB image -> uint8 (C, H, W)."""
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
