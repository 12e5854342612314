"""Paths from data (t = 0) to noise (t = 1): x_t = alpha_t x0 + beta_t x1, with x1 ~ N(0, I)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from soflow_core.rows import per_row

PathName = Literal["linear", "trigonometric"]


@dataclass(frozen=True)
class PathPoint:
    """Coefficients of a path at times t, each (B,), and their derivatives in t."""

    alpha: Tensor
    beta: Tensor
    d_alpha: Tensor
    d_beta: Tensor

    def state(self, x0: Tensor, x1: Tensor) -> Tensor:
        """(B, C, H, W), (B, C, H, W) -> (B, C, H, W): x_t = alpha x0 + beta x1."""
        return per_row(self.alpha, x0) * x0 + per_row(self.beta, x1) * x1

    def velocity(self, x0: Tensor, x1: Tensor) -> Tensor:
        """(B, C, H, W), (B, C, H, W) -> (B, C, H, W): v_c = alpha' x0 + beta' x1, the velocity of this sample."""
        return per_row(self.d_alpha, x0) * x0 + per_row(self.d_beta, x1) * x1


def linear(t: Tensor) -> PathPoint:
    """alpha = 1 - t, beta = t (Flow Matching, arXiv 2210.02747, and rectified flow)."""
    one = torch.ones_like(t)
    return PathPoint(alpha=1 - t, beta=t, d_alpha=-one, d_beta=one)


def trigonometric(t: Tensor) -> PathPoint:
    """alpha = cos(pi t / 2), beta = sin(pi t / 2)."""
    quarter = math.pi / 2
    cos, sin = torch.cos(quarter * t), torch.sin(quarter * t)
    return PathPoint(alpha=cos, beta=sin, d_alpha=-quarter * sin, d_beta=quarter * cos)


PATHS: dict[str, Callable[[Tensor], PathPoint]] = {"linear": linear, "trigonometric": trigonometric}
