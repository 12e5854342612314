"""The solution function in terms of the network: f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s), f(x, t, t) = x."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_core.registration import Registry, register
from soflow_core.rows import per_row


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


class Parameterization(ABC):
    """A way of writing the solution in terms of the network: a frozen dataclass whose settings have defaults.

    a = 1 and b = 0 where s = t, b is below 0 where s < t, and b_s is above 0 at s = t: the network's output and the velocity determine
    each other. Settings of methods name one as `NAME`, or as `NAME:VALUE` where it has one setting, a number.
    """

    name: str
    """Given by `@register`."""

    @abstractmethod
    def __call__(self, t: Tensor, s: Tensor) -> Coefficients:
        """(B,), (B,) -> the coefficients at (t, s), each a function of its own row alone."""


PARAMETERIZATIONS: Registry[Parameterization] = Registry("parameterization", Parameterization, "name")  # type: ignore[type-abstract]


@register("euler")
@dataclass(frozen=True)
class EulerParameterization(Parameterization):
    """a = 1, b = s - t: F is the average velocity between s and t."""

    def __call__(self, t: Tensor, s: Tensor) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(a=one, b=s - t, da_ds=torch.zeros_like(t), db_ds=one)


@register("trigonometric")
@dataclass(frozen=True)
class TrigonometricParameterization(Parameterization):
    """a = cos(pi (s - t) / 2), b = sin(pi (s - t) / 2): the velocity is (pi / 2) F at s = t."""

    def __call__(self, t: Tensor, s: Tensor) -> Coefficients:
        quarter = math.pi / 2
        cos, sin = torch.cos(quarter * (s - t)), torch.sin(quarter * (s - t))
        return Coefficients(a=cos, b=sin, da_ds=-quarter * sin, db_ds=quarter * cos)
