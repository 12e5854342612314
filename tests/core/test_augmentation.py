"""Augmentation with labels: what is done is what the network is told, and nothing is told at sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.augmentation import Augmentations, augment, augmentation, draw_augmentations
from soflow_core.conformance.test_network import filled
from soflow_core.networks import DiTConfig, UNet, UNetConfig
from soflow_core.objectives import Batch, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig

NOTHING = Augmentations(*(torch.zeros(1) for _ in range(4)), shift=torch.zeros(1, 2))
CONFIG = UNetConfig.example(channels=1, height=8, width=8, augmentations=6)


def moved(image: Tensor, **done: float | list[float]) -> Tensor:
    values = {name: torch.tensor([value]) for name, value in done.items()}
    return augment(image, replace(NOTHING, **values))


def smooth(height: int = 16, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(1, 1, H, W) a blob beside the middle, and the centred places x and y of the pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    return blob(x, y), x, y


def blob(x: Tensor, y: Tensor) -> Tensor:
    return torch.exp(-((x - 1) ** 2 + 0.5 * (y + 1.5) ** 2) / 6)[None, None]


def test_each_augmentation_moves_pixels_as_its_label_says() -> None:
    image, x, y = smooth()
    assert torch.equal(moved(image), image)
    assert torch.equal(moved(image, flip=1.0), image.flip(-1))
    # A shift of one standard deviation is an eighth of the sides: two pixels.
    assert_close(moved(image, shift=[1.0, -1.0]), blob(x - 2, y + 2), rtol=0, atol=0.03)
    assert_close(moved(image, scale=1.0), blob(x / 2**0.2, y / 2**0.2), rtol=0, atol=0.03)
    # The outermost pixels of what is made smaller come from beyond the border.
    wide = moved(image, stretch=1.0)[..., 1:-1, :]
    assert_close(wide, blob(x / 2**0.2, y * 2**0.2)[..., 1:-1, :], rtol=0, atol=0.03)
    upright = moved(image, stretch=1.0, axis=torch.pi / 2)
    assert_close(upright, blob(x * 2**0.2, y / 2**0.2), rtol=0, atol=0.03)


def test_sides_of_other_lengths_are_shifted_by_their_own() -> None:
    image, x, y = smooth(8, 16)
    shifted = moved(image, shift=[1.0, 1.0])
    # The first row comes from beyond the border.
    assert_close(shifted[..., 1:, :], blob(x - 2, y - 1)[..., 1:, :], rtol=0, atol=0.03)


def test_shares_and_labels_are_those_asked_for() -> None:
    done = draw_augmentations(torch.Generator().manual_seed(0), 20_000, 0.12)
    assert float(done.flip.mean()) == pytest.approx(0.5, abs=0.02)
    for values in (done.scale, done.stretch, done.shift[:, 0]):
        used = values[values != 0]
        assert len(used) / 20_000 == pytest.approx(0.12, abs=0.01)
        assert float(used.std()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(done.shift[:, 0] != 0, done.shift[:, 1] != 0)
    labels = done.labels
    assert labels.shape == (20_000, 6)
    assert_close(labels[:, 2:4].norm(dim=1), done.stretch.abs())
    still = (labels[:, 1:] == 0).all(dim=1)
    images = torch.randn(200, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    part = Augmentations(**{name: value[:200] for name, value in vars(done).items()})
    result = augment(images, part)
    same = torch.where(part.flip[:, None, None, None] > 0, images.flip(-1), images)
    assert torch.equal(result[still[:200]], same[still[:200]])
    assert not torch.equal(result, same)


def network() -> UNet:
    built = filled(CONFIG.build(), seed=0).train()
    assert isinstance(built, UNet)
    return built


@torch.no_grad()
def test_the_network_is_told_in_training_alone() -> None:
    net, batch = network(), Batch(torch.randn(4, 1, 8, 8))
    inputs = batch.x0, torch.ones(4), torch.zeros(4)
    plain = net(*inputs)
    with augmentation(net, batch, 1.0, (0, 3, 1)) as given:
        told = net(*inputs)
        assert not torch.allclose(told, plain)
        assert torch.equal(net.eval()(*inputs), plain)
        net.train()
        with pytest.raises(ValueError, match="a pass of 2 of 4 augmented rows"):
            net(*(each[:2] for each in inputs))
    assert torch.equal(net(*inputs), plain)
    assert not torch.equal(given.x0, batch.x0)
    with augmentation(net, batch, 1.0, (0, 3, 1)) as again:
        assert torch.equal(again.x0, given.x0)
    with augmentation(net, batch, None, (0, 3, 1)) as untouched:
        assert untouched is batch


def step_with(net: Any, share: float) -> bool:
    objective = SoFlow(flow_matching_share=share)
    settings = TrainStepConfig(10, OptimizerConfig(lr=1e-3), precision="float32", augment=0.5)
    draws = objective.draw(torch.Generator().manual_seed(0), 8, (1, 8, 8), False)
    return TrainStep(net, objective, settings)(Batch(torch.randn(8, 1, 8, 8)), draws).finite


def test_a_step_trains_the_labels_weights_and_needs_passes_of_all_rows() -> None:
    net = network()
    assert net.map_augment is not None
    before = net.map_augment.weight.detach().clone()
    assert step_with(net, 0.0)
    assert not torch.equal(net.map_augment.weight, before)
    assert net.augmentation is None
    with pytest.raises(ValueError, match="as SoFlow with flow_matching_share 0"):
        step_with(
            UNetConfig.example(channels=1, height=8, width=8, augmentations=6, dropout=0.1).build(), 0.5
        )


def test_a_network_that_would_not_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this network knows 0: give network.augmentations=6"):
        step_with(DiTConfig(1, 8, 8, patch=4, hidden=16, depth=1, heads=2).build(), 0.0)
