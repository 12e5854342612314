"""Images written: grids, PNG files, folders."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_pipelines.images.convert import to_uint8, to_unit_range
from soflow_pipelines.images.encode import encode_png, image_grid, write_folder


def test_a_grid_shows_each_image_at_its_place_on_white() -> None:
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 1, 2, 3) * 10
    grid = image_grid(images, columns=3, padding=1, enlarge=2)
    assert grid.shape == (2 * 5 + 1, 3 * 7 + 1, 3)
    assert (grid[1:5, 8:14] == 10).all()
    assert (grid[6:10, 1:7] == 30).all()
    assert (grid[0] == 255).all()
    assert (grid[6:, 15:] == 255).all()


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 5, 4), (5, 4, 3), (5, 4)])
def test_a_png_holds_exactly_the_pixels(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    read = np.asarray(Image.open(io.BytesIO(encode_png(image))))
    expected = image.transpose(1, 2, 0) if shape[0] in (1, 3) else image
    np.testing.assert_array_equal(read, expected.squeeze())


def test_pixels_that_are_not_uint8_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_png(np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="uint8"):
        image_grid(torch.zeros(1, 1, 2, 2))


def test_a_folder_gets_one_numbered_file_for_each_image(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 4)).astype(np.uint8)
    paths = write_folder(images, tmp_path / "out", start=7)
    assert [path.name for path in paths] == ["00000007.png", "00000008.png", "00000009.png"]
    assert sorted(tmp_path.joinpath("out").iterdir()) == paths
    np.testing.assert_array_equal(np.asarray(Image.open(paths[1])), images[1].transpose(1, 2, 0))


def test_every_grey_level_survives_the_way_to_the_network_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit_range(levels)
    assert unit[0] == -1
    assert unit[-1] == 1
    assert torch.equal(to_uint8(unit), levels)


def test_values_outside_the_range_are_clamped_and_fractions_cut() -> None:
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0, 0.0117])).tolist() == [0, 255, 128, 129]
