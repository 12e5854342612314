"""Encoded images to RGB, the centre crop, and arrays."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from soflow_core.failures import InputError, printable, summarize
from soflow_pipelines.images.limits import DEFAULT_LIMITS, ImageLimits

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""Formats that are decoded, by content. Pillow knows many more, one of which (EPS) starts another program."""
THIN = 16
"""Ratio of sides beyond which an image is cropped before it is scaled."""
NPY_HEADER_BYTES = 10_000
# What Pillow warns of is either harmless (odd EXIF data) or has a limit of its own here (the number of pixels).
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(InputError):
    """An image that cannot be used. The text names it and says what is wrong."""


def check_size(size: int, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Raises ImageError for the file of an image that is larger than the limits allow; it need not be read for that."""
    if size > limits.file_bytes:
        raise ImageError(
            f"{name}: {size / 2**20:,.0f} MiB, more than the {limits.file_megabytes} MiB that are read (--max-file-mb)."
        )


def check_sides(width: int, height: int, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Raises ImageError for an image with more pixels, or longer in proportion, than the limits allow."""
    if width * height > limits.pixels:
        raise ImageError(
            f"{name}: {width} x {height} pixels, more than the {limits.megapixels} million that are read (--max-megapixels)."
        )
    if max(width, height) > limits.ratio * min(width, height):
        raise ImageError(
            f"{name}: {width} x {height} pixels, sides further apart than the {limits.ratio:,} to 1 that are read (--max-ratio)."
        )


def check_growth(packed: int, size: int, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> None:
    """Raises ImageError for a compressed member whose bytes grow by more than the limits allow; it need not be unpacked for that."""
    if size > limits.growth * packed:
        raise ImageError(
            f"{name}: {packed:,} bytes that unpack to {size:,}, more than the {limits.growth:,} times that are read (--max-growth)."
        )


def decode_image(content: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An encoded image -> RGB, upright. Raises ImageError with its name where it is damaged, too large or no image.

    Grey, palette and CMYK images become RGB, 16-bit grey is scaled to 8 bits, transparent pixels are blended
    with white, and an EXIF orientation is applied. The format is that of the content, one of FORMATS.
    """
    check_size(len(content), name, limits)
    if Image.MAX_IMAGE_PIXELS is not None:
        # Pillow's own limit, which is for the whole process, is never below the one asked for.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limits.pixels)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        check_sides(image.width, image.height, name, limits)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), name)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: not an image that can be read ({', '.join(FORMATS)}).") from error
    except MemoryError as error:
        raise ImageError(f"{name}: there is not enough memory to decode it.") from error
    except Exception as error:
        # A decoder that meets bytes it does not expect may raise anything.
        raise ImageError(f"{name}: damaged ({summarize(error)}).") from error


def pixels_of_npy(content: bytes, name: str, limits: ImageLimits = DEFAULT_LIMITS) -> Image.Image:
    """An .npy file of uint8 pixels, (H, W, C) or (C, H, W) with C 1 or 3 -> RGB or L. Raises ImageError with its name.

    The header is compared with the file's length before anything is allocated.
    """
    check_size(len(content), name, limits)
    try:
        file = io.BytesIO(content)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format")
        read_header = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        header: tuple[Any, ...] = read_header(file, max_header_size=NPY_HEADER_BYTES)
        shape, fortran, dtype = header
        data = content[file.tell() :]
        if dtype != np.uint8 or len(shape) != 3 or not {shape[0], shape[2]} & {1, 3}:
            raise ValueError(f"{dtype} {shape} are not the pixels of an image")
        if min(shape) < 1 or math.prod(shape) != len(data):
            raise ValueError(f"{len(data)} bytes for pixels of shape {shape}")
        pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
    except Exception as error:
        # numpy parses the header as Python text, which may fail in many ways.
        raise ImageError(f"{name}: damaged ({printable(summarize(error))}).") from error
    if pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[2] not in (1, 3):
        raise ImageError(f"{name}: damaged (uint8 {pixels.shape} are not the pixels of an image).")
    check_sides(pixels.shape[1], pixels.shape[0], name, limits)
    return Image.fromarray(np.ascontiguousarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels))


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
    bicubically until the shorter side is the target, and cut in the middle. Of an image that is more than THIN times as
    long as it is wide, the middle is cut out first, so that no more than that is scaled.
    """
    short, long = min(image.size), max(image.size)
    if long > THIN * short:
        left, top = (max(0, (side - THIN * short) // 2) for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
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
