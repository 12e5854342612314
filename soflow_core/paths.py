"""Paths from data (t = 0) to noise (t = 1): x_t = alpha_t x0 + beta_t x1, with x1 ~ N(0, I). A path is a registered part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_core.registration import Registry, register
from soflow_core.rows import per_row


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


class Path(ABC):
    """A path from data to noise: a frozen dataclass whose settings have defaults, a function of t alone.

    alpha falls from 1 at t = 0 to 0 at t = 1, beta rises from 0 to 1, and both have finite derivatives there. Settings of methods name
    a path as `NAME`, or as `NAME:VALUE` where it has one setting, a number.
    """

    name: str
    """Given by `@register`."""

    @abstractmethod
    def __call__(self, t: Tensor) -> PathPoint:
        """(B,) float32 or float64 times from 0 to 1 -> the coefficients there, of the same type and on the same device."""


PATHS: Registry[Path] = Registry("path", Path, "name")  # type: ignore[type-abstract]


@register("linear")
@dataclass(frozen=True)
class LinearPath(Path):
    """alpha = 1 - t, beta = t (Flow Matching, arXiv 2210.02747, and rectified flow)."""

    def __call__(self, t: Tensor) -> PathPoint:
        one = torch.ones_like(t)
        return PathPoint(alpha=1 - t, beta=t, d_alpha=-one, d_beta=one)


@register("trigonometric")
@dataclass(frozen=True)
class TrigonometricPath(Path):
    """alpha = cos(pi t / 2), beta = sin(pi t / 2)."""

    def __call__(self, t: Tensor) -> PathPoint:
        quarter = math.pi / 2
        cos, sin = torch.cos(quarter * t), torch.sin(quarter * t)
        return PathPoint(alpha=cos, beta=sin, d_alpha=-quarter * sin, d_beta=quarter * cos)


linear = LinearPath()
"""The path of methods that are defined on it alone."""
