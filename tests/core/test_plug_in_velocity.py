"""The plug-in velocity is the velocity field of the images that it is given."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.plug_in_velocity import plug_in_velocity
from tests.core.test_point_data import A, two_points_velocity
from tests.support.gaussian import Gaussian, column

SHAPE = (2, 3, 3)


def rows(count: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x0, noise (B, 2, 3, 3) and t (B,) from near the data to near the noise."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, count, *SHAPE, generator=generator, dtype=torch.float64)
    return x0, noise, torch.linspace(0.05, 0.99, count, dtype=torch.float64)


def every(x0: Tensor, images: Tensor) -> Tensor:
    return torch.ones(len(x0), len(images), dtype=torch.bool)


def test_of_two_points_it_is_their_velocity_field() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.tensor([-A, A], dtype=torch.float64).reshape(2, 1, 1, 1)
    x0 = images.repeat(20, 1, 1, 1)
    noise = torch.randn(40, 1, 1, 1, generator=generator, dtype=torch.float64)
    t = 0.05 + 0.94 * torch.rand(40, generator=generator, dtype=torch.float64)
    x_t = (1 - column(t)) * x0 + column(t) * noise
    found = plug_in_velocity(x0, noise, t, images, every(x0, images))
    assert_close(found, two_points_velocity(x_t, t), rtol=1e-9, atol=1e-9)
    twice = torch.cat([images, images])
    assert_close(plug_in_velocity(x0, noise, t, twice, every(x0, twice)), found)


def test_of_many_images_of_a_gaussian_it_is_the_velocity_of_the_gaussian() -> None:
    data, generator = Gaussian(), torch.Generator().manual_seed(0)
    images = data.mean + data.std * torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    x0, t = images[:8], torch.linspace(0.3, 0.95, 8, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x_t = (1 - column(t)) * x0 + column(t) * noise
    found = plug_in_velocity(x0, noise, t, images, every(x0, images))
    assert_close(found, data.velocity(x_t, t), rtol=0.02, atol=0.02)


def test_it_is_the_mean_of_the_velocities_through_x_by_their_posteriors() -> None:
    """v = sum_b w_b (x_t - x_b) / t over the allowed images, w the softmax of -|x_t - (1 - t) x_b|^2 / (2 t^2)."""
    x0, noise, t = rows()
    allowed = torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed |= torch.eye(9, dtype=torch.bool)
    time = column(t)[:, None]
    x_t = (1 - column(t)) * x0 + column(t) * noise
    away = x_t[:, None] - (1 - time) * x0
    logits = -(away.square().sum((2, 3, 4)) / (2 * t[:, None] ** 2)).masked_fill(~allowed, torch.inf)
    through = (x_t[:, None] - x0) / time
    expected = (logits.softmax(1)[..., None, None, None] * through).sum(1)
    assert_close(plug_in_velocity(x0, noise, t, x0, allowed), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("time", [0.0, 1e-8, 1e-3, 0.5])
def test_of_its_own_image_alone_it_is_the_velocity_of_the_sample(dtype: torch.dtype, time: float) -> None:
    """So it is of many, so near to the data that no other image is likely: to the last bit, for rounding is divided by t."""
    x0, noise, _ = (each.to(dtype) for each in rows())
    t = torch.full((9,), time, dtype=dtype)
    alone = torch.eye(9, dtype=torch.bool)
    assert torch.equal(plug_in_velocity(x0, noise, t, x0, alone), noise - x0)
    if time < 0.01:
        assert torch.equal(plug_in_velocity(x0, noise, t, x0, every(x0, x0)), noise - x0)


def test_from_pure_noise_every_image_is_as_likely() -> None:
    x0, noise, _ = rows()
    found = plug_in_velocity(x0, noise, torch.ones(9, dtype=torch.float64), x0, every(x0, x0))
    assert_close(found, noise - x0.mean(0))
