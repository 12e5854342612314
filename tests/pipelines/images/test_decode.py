"""Images as people have them: every mode, turned, damaged; and the crop."""

import io

import numpy as np
import pytest
from PIL import Image

from soflow_pipelines.images.decode import ImageError, centre_crop, decode_image, to_array


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def picture(width: int = 40, height: int = 30) -> Image.Image:
    across = np.linspace(0, 255, width)[None].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([across, down, 255 - across], 2).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "LA", "RGBA"])
def test_every_mode_becomes_rgb_of_the_same_size(mode: str) -> None:
    decoded = decode_image(encoded(picture().convert(mode)), "x.png")
    assert decoded.mode == "RGB"
    assert decoded.size == (40, 30)


def test_a_grey_image_is_the_same_in_all_channels() -> None:
    pixels = to_array(decode_image(encoded(picture().convert("L"), "JPEG"), "grey.jpg"))
    assert (pixels == pixels[:1]).all()


def test_a_cmyk_image_keeps_its_colours() -> None:
    decoded = decode_image(encoded(picture().convert("CMYK"), "TIFF"), "x.tif")
    difference = np.abs(np.asarray(decoded, float) - np.asarray(picture(), float))
    assert difference.max() <= 2


def test_sixteen_bits_of_grey_keep_their_eight_highest() -> None:
    levels = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    decoded = decode_image(encoded(Image.fromarray(levels)), "x.png")
    np.testing.assert_array_equal(np.asarray(decoded)[..., 0], levels >> 8)


def test_what_is_transparent_is_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (np.asarray(decode_image(encoded(clear), "x.png")) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([200, 0, 0] + [0] * 765)
    shown = decode_image(encoded(palette, transparency=0), "x.png")
    assert (np.asarray(shown) == 255).all()


def test_an_image_is_turned_upright_by_its_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    decoded = decode_image(encoded(picture(), "JPEG", exif=exif, quality=95), "x.jpg")
    assert decoded.size == (30, 40)
    upright = np.asarray(picture().transpose(Image.Transpose.ROTATE_270), float)
    assert np.abs(np.asarray(decoded, float) - upright).mean() < 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_truncated_image_is_named(kind: str) -> None:
    content = encoded(picture(), kind)
    with pytest.raises(ImageError, match=r"^cats/7\.jpg: damaged"):
        decode_image(content[: len(content) // 2], "cats/7.jpg")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\xff\xd8\xff"])
def test_what_is_no_image_is_named(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"^x\.jpg:"):
        decode_image(content, "x.jpg")


@pytest.mark.parametrize("size", [(256, 256), (500, 375), (375, 500), (1200, 1600), (257, 300), (40, 30)])
def test_the_crop_is_square_and_of_the_size_asked_for(size: tuple[int, int]) -> None:
    assert centre_crop(picture(*size), 256).size == (256, 256)


def test_an_image_of_the_right_size_is_left_as_it_is() -> None:
    np.testing.assert_array_equal(np.asarray(centre_crop(picture(64, 64), 64)), np.asarray(picture(64, 64)))


def test_the_crop_keeps_the_middle_of_the_longer_side() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = 255
    assert (np.asarray(centre_crop(Image.fromarray(pixels), 32)) == 255).all()


def test_halving_averages_blocks_before_the_bicubic_step() -> None:
    """A checkerboard of single pixels averages to grey, where bicubic sampling alone would alias."""
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    small = np.asarray(centre_crop(Image.fromarray(board).convert("RGB"), 64))
    assert np.abs(small.astype(int) - 128).max() <= 1
