"""The velocity field of a set of images, in the place of a sample's velocity (plug-in velocity, arXiv 2512.11831)."""

from __future__ import annotations

import torch
from torch import Tensor

from soflow_core.rows import per_row

SMALLEST_TIME = 1e-6
"""Below it the nearest image alone counts."""


def plug_in_velocity(x0: Tensor, noise: Tensor, t: Tensor, images: Tensor, allowed: Tensor) -> Tensor:
    """-> (B, C, H, W): v(x_t) = sum_b w_b (x_t - x_b) / t of the linear path, for x_t of `x0` and `noise` (B, C, H, W) at t (B,).

    w_b is the posterior probability of image b of `images` (N, C, H, W), all equally likely, given x_t: the softmax over b of
    -|x_t - (1 - t) x_b|^2 / (2 t^2). `allowed` (B, N) bool says which images a row's velocity is of. A row's own image is among them.
    """
    rows, others = x0.flatten(1), images.flatten(1)
    t = t.clamp(min=SMALLEST_TIME)
    ratio = ((1 - t) / t)[:, None]
    # From the differences themselves: squares of the norms would cancel, and an equal image must be at a distance of 0.
    distance = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    same = distance == 0
    along = (noise.flatten(1) * rows).sum(1, keepdim=True) - noise.flatten(1) @ others.T
    # |x_t - (1 - t) x_b|^2 / t^2 = |noise + ratio (x0 - x_b)|^2, less |noise|^2, which all images have.
    energy = torch.where(same, 0, ratio * along + (ratio * distance).square() / 2)
    weights = (-energy).masked_fill(~allowed, -torch.inf).softmax(1)
    # sum_b w_b (x0 - x_b) over the other images: exactly 0 where none of them has any weight.
    weights = torch.where(same, 0, weights)
    away = weights.sum(1, keepdim=True) * rows - weights @ others
    return noise - x0 + away.reshape(x0.shape) / per_row(t, x0)
