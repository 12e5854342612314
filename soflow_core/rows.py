"""Arithmetic between per-row values (B,) and batches of images (B, C, H, W)."""

from __future__ import annotations

import torch
from torch import Tensor


def per_row(value: Tensor, like: Tensor) -> Tensor:
    """(B,), (B, C, H, W) -> (B, 1, 1, 1): per-row values in a shape that broadcasts against `like`."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))


def row_mean(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): the mean over a row's D = C H W elements."""
    return x.flatten(1).mean(1)


def row_sum(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B,): the sum over a row's D = C H W elements."""
    return x.flatten(1).sum(1)


def choose_rows(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """(B,) bool, (B, C, H, W) x 2 -> (B, C, H, W): rows of `yes` where the condition holds, else of `no`."""
    return torch.where(per_row(condition, yes), yes, no)
