"""Exact velocities and solutions of the linear path for normal data and for mixtures of normals.

S_t^2 = (1 - t)^2 std^2 + t^2 is the variance of x_t, and the flow keeps (x - (1 - t) mean) / S_t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_core.objectives import Batch, Draws

SHAPE = (1, 2, 2)


def column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


@dataclass(frozen=True)
class Gaussian:
    mean: float = 0.7
    std: float = 0.5

    def spread(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v = -mean + (S'/S) z with S S' = t - (1 - t) std^2."""
        t = column(t)
        growth = (t - (1 - t) * self.std**2) / self.spread(t) ** 2
        return -self.mean + growth * (x - (1 - t) * self.mean)

    def solution(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t, s = column(t), column(s)
        return (1 - s) * self.mean + self.spread(s) / self.spread(t) * (x - (1 - t) * self.mean)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """(x - f) / (t - s), and v where s = t; differentiable in forward mode."""
        same = (t == s).reshape(-1, 1, 1, 1)
        gap = torch.where(same, torch.ones_like(column(t)), column(t - s))
        return torch.where(same, self.velocity(x, t), (x - self.solution(x, t, s)) / gap)

    def network(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """F of the Euler parameterization."""
        del labels
        return self.average_velocity(x, t, s)


def rows_along(
    x: Tensor, t: Tensor, s: Tensor, velocity: Tensor, velocity_rows: int = 0
) -> tuple[Batch, Draws]:
    """Data and noise that meet in x at time t with this velocity: x0 = x - t v, x1 = x + (1 - t) v.

    An objective that is given these sees the velocity field in the place of a sample's velocity.
    """
    batch = Batch(x - column(t) * velocity)
    return batch, Draws(x + column(1 - t) * velocity, t, s, None, velocity_rows)


def grid_points(count: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, 1, 2, 2), t, s (B,) in float64 with s <= t - 0.05."""
    generator = torch.Generator().manual_seed(seed)
    t = 0.1 + 0.85 * torch.rand(count, generator=generator, dtype=torch.float64)
    s = (t - 0.05) * torch.rand(count, generator=generator, dtype=torch.float64)
    x = 1.5 * torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return x, t, s


def runge_kutta(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor, s: Tensor, steps: int = 400
) -> Tensor:
    """The solution at s of dx/dt = v, by the classical fourth-order method."""
    h = (s - t) / steps
    for i in range(steps):
        now = t + i * h
        k1 = velocity(x, now)
        k2 = velocity(x + column(h / 2) * k1, now + h / 2)
        k3 = velocity(x + column(h / 2) * k2, now + h / 2)
        k4 = velocity(x + column(h) * k3, now + h)
        x = x + column(h / 6) * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@dataclass(frozen=True)
class Mixture:
    """One-dimensional mixture of two normals, carried by quantiles: f(x, t, s) = Q_s(CDF_t(x))."""

    weights: tuple[float, float] = (0.3, 0.7)
    means: tuple[float, float] = (-1.0, 0.8)
    stds: tuple[float, float] = (0.3, 0.5)

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = column(t)
        weights = torch.tensor(self.weights, dtype=x.dtype)
        centres = (1 - t)[..., None] * torch.tensor(self.means, dtype=x.dtype)
        spreads = (
            (1 - t)[..., None] ** 2 * torch.tensor(self.stds, dtype=x.dtype) ** 2 + t[..., None] ** 2
        ).sqrt()
        return weights, (x[..., None] - centres) / spreads, spreads

    def cdf(self, x: Tensor, t: Tensor) -> Tensor:
        weights, z, _ = self._parts(x, t)
        return (weights * torch.special.ndtr(z)).sum(-1)

    def quantile(self, p: Tensor, t: Tensor) -> Tensor:
        low, high = torch.full_like(p, -12), torch.full_like(p, 12)
        for _ in range(100):
            middle = (low + high) / 2
            below = self.cdf(middle, t) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def solution(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.quantile(self.cdf(x, t), s)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The components' velocities, weighted by their responsibilities."""
        weights, z, spreads = self._parts(x, t)
        density = weights * torch.exp(-(z**2) / 2) / spreads
        share = density / density.sum(-1, keepdim=True)
        means, stds = torch.tensor(self.means, dtype=x.dtype), torch.tensor(self.stds, dtype=x.dtype)
        time = column(t)[..., None]
        growth = (time - (1 - time) * stds**2) / spreads
        return (share * (-means + growth * z)).sum(-1)

    def network(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        del labels
        gap = column(t - s)
        still = gap.abs() < 1e-12
        moved = (x - self.solution(x, t, s)) / torch.where(still, torch.ones_like(gap), gap)
        return torch.where(still, self.velocity(x, t), moved)
