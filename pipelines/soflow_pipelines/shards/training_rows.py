"""Stored rows -> what a network trains on, on the training device."""

from __future__ import annotations

import torch
from torch import Tensor

from soflow_core.counter_draws import POSTERIOR, fourth_word, normal_rows
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.shards.info import DatasetInfo


def training_rows(
    stored: Tensor, positions: Tensor, info: DatasetInfo, seed: int, device: torch.device
) -> Tensor:
    """(B, ...) as stored, and (B,) int64 positions in the global order -> x0 (B, C, H, W) float32 on the device.

    Pixels are scaled to [-1, 1]. Of a latent x0 = (mean + std eps - shift) scaling, where eps is a function of (seed, position) by
    `soflow_core.counter_draws`: fresh at each visit, the same for any number of ranks.
    """
    moved = stored.to(device, non_blocking=True)
    if info.kind == "pixels":
        return to_unit_range(moved)
    mean, std = moved.chunk(2, dim=1)
    positions = positions.to(device, non_blocking=True)
    shape = tuple(mean.shape[1:])
    noise = normal_rows(seed, positions, shape, positions >> 32, fourth_word(POSTERIOR))
    return noise.mul_(std).add_(mean).sub_(info.shift).mul_(info.scaling)
