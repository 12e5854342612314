"""Geometric augmentation that a network is told of, so that it does not leak into samples (EDM, arXiv 2206.00364, section 5).

Each image is flipped with probability 1/2, and scaled, stretched and shifted with a small probability each. What was done is the
image's augmentation labels; samples are made with labels of 0, and look as the images did. Images are resampled by bicubic
interpolation and continued beyond their border by reflection, where EDM filters with a wavelet at twice the resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from soflow_core.dropout import step_seed
from soflow_core.networks.base import NetworkModule
from soflow_core.objectives.base import Batch

LABELS = 6
"""Flip; scale; stretch, as a vector of two; shift to the right and down."""
SCALE_STD, STRETCH_STD, SHIFT_STD = 0.2, 0.2, 0.125
"""Standard deviations: of the logarithm to base 2 of scale and stretch, and of a shift in sides of the image."""
ROTATED = 0.5
"""Share of the stretches whose axis is not horizontal."""


@dataclass(frozen=True)
class Augmentations:
    """What is done to each of B images; scale, stretch and shift are standard normal values where they are not 0."""

    flip: Tensor
    """(B,), 1 where left and right are exchanged."""
    scale: Tensor
    """(B,)."""
    stretch: Tensor
    """(B,)."""
    axis: Tensor
    """(B,), the angle of the axis along which images are stretched."""
    shift: Tensor
    """(B, 2), to the right and down."""

    @property
    def labels(self) -> Tensor:
        """(B, 6): what the network is told."""
        stretch = self.stretch[:, None] * torch.stack([self.axis.cos(), self.axis.sin()], dim=1)
        return torch.cat([self.flip[:, None], self.scale[:, None], stretch, self.shift], dim=1)


def draw_augmentations(generator: torch.Generator, rows: int, probability: float) -> Augmentations:
    """Augmentations of so many images; scale, stretch and shift each with this probability."""

    def sometimes(values: Tensor, share: float) -> Tensor:
        chosen = torch.rand(rows, generator=generator) < share
        return values * chosen.reshape(-1, *[1] * (values.dim() - 1))

    def normal(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=generator)

    flip = torch.randint(2, (rows,), generator=generator).float()
    scale = sometimes(normal(), probability)
    stretch = sometimes(normal(), probability)
    axis = sometimes(math.pi * (2 * torch.rand(rows, generator=generator) - 1), ROTATED)
    return Augmentations(flip, scale, stretch, axis, sometimes(normal(2), probability))


def augment(images: Tensor, done: Augmentations) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W). Images that are only flipped, or not changed, keep their values bit for bit."""
    images = torch.where(done.flip[:, None, None, None] > 0, images.flip(-1), images)
    moved = (done.scale != 0) | (done.stretch != 0) | (done.shift != 0).any(dim=1)
    rows = torch.nonzero(moved).squeeze(1)
    if len(rows) == 0:
        return images
    result = images.clone()
    grid = _sources(done, (images.shape[-2], images.shape[-1]))[rows]
    result[rows] = grid_sample(
        images[rows], grid, mode="bicubic", padding_mode="reflection", align_corners=False
    )
    return result


def _sources(done: Augmentations, sides: tuple[int, int]) -> Tensor:
    """-> (B, H, W, 2): where each pixel's value comes from, as (x, y) from -1 to 1 between the borders."""
    height, width = sides
    size = torch.tensor([width, height], dtype=done.scale.dtype, device=done.scale.device)
    x, y = (torch.arange(int(n), device=size.device) - (int(n) - 1) / 2 for n in (width, height))
    places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).to(size.dtype)
    places = places - (SHIFT_STD * done.shift * size)[:, None, None]
    cos, sin = done.axis.cos(), done.axis.sin()
    turn = torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
    factor = torch.exp2(-STRETCH_STD * done.stretch)
    along = torch.diag_embed(torch.stack([factor, 1 / factor], dim=1))
    shrink = torch.exp2(-SCALE_STD * done.scale)[:, None, None] * turn @ along @ turn.transpose(1, 2)
    return torch.einsum("bij,bhwj->bhwi", shrink, places) * 2 / size


@contextmanager
def augmentation(
    network: nn.Module, batch: Batch, probability: float | None, place: tuple[int, ...]
) -> Iterator[Batch]:
    """Context of a batch with augmented images, whose labels the network is given; without a probability the batch as it is.

    What is drawn is a function of `place` (seed, step, piece) and the rank. Raises ValueError where the network knows no such labels:
    what it is not told of would leak into its samples.
    """
    if probability is None:
        yield batch
        return
    known = getattr(network.config, "augmentations", 0) if isinstance(network, NetworkModule) else 0
    if known != LABELS or not isinstance(network, NetworkModule):
        raise ValueError(
            f"augmentation has {LABELS} labels, and this network knows {known}: give network.augmentations={LABELS} (kind unet), or no "
            "training.augment"
        )
    generator = torch.Generator().manual_seed(step_seed("augmentation", *place))
    done = draw_augmentations(generator, len(batch.x0), probability)
    done = Augmentations(**{name: value.to(batch.x0.device) for name, value in vars(done).items()})
    network.augmentation = done.labels
    try:
        yield Batch(augment(batch.x0, done), batch.labels)
    finally:
        network.augmentation = None
