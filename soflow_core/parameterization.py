"""The solution function in terms of the network: f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s), f(x, t, t) = x."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from soflow_core.rows import per_row

ParameterizationName = Literal["euler", "trigonometric"]


@dataclass(frozen=True)
class Coefficients:
    """Coefficients a and b at times (t, s), each (B,), and their derivatives in s."""

    a: Tensor
    b: Tensor
    da_ds: Tensor
    db_ds: Tensor

    def solution(self, x: Tensor, prediction: Tensor) -> Tensor:
        """(B, C, H, W), (B, C, H, W) -> (B, C, H, W): f = a x + b F."""
        return per_row(self.a, x) * x + per_row(self.b, x) * prediction

    def velocity(self, x: Tensor, prediction: Tensor) -> Tensor:
        """(B, C, H, W), (B, C, H, W) -> (B, C, H, W): df/ds = a_s x + b_s F, the velocity at (x, t) where s = t."""
        return per_row(self.da_ds, x) * x + per_row(self.db_ds, x) * prediction


def euler(t: Tensor, s: Tensor) -> Coefficients:
    """a = 1, b = s - t: F is the average velocity between s and t."""
    one = torch.ones_like(t)
    return Coefficients(a=one, b=s - t, da_ds=torch.zeros_like(t), db_ds=one)


def trigonometric(t: Tensor, s: Tensor) -> Coefficients:
    """a = cos(pi (s - t) / 2), b = sin(pi (s - t) / 2): the velocity is (pi / 2) F at s = t."""
    quarter = math.pi / 2
    cos, sin = torch.cos(quarter * (s - t)), torch.sin(quarter * (s - t))
    return Coefficients(a=cos, b=sin, da_ds=-quarter * sin, db_ds=quarter * cos)


PARAMETERIZATIONS: dict[str, Callable[[Tensor, Tensor], Coefficients]] = {
    "euler": euler,
    "trigonometric": trigonometric,
}
