"""Shared by MeanFlow, improved MeanFlow, ESC, alpha-Flow and Shortcut: F is the average velocity between s and t, f = x - (t - s) F."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from soflow_core.guidance import VelocityGuidance, null_labels
from soflow_core.objectives.base import Draws
from soflow_core.objectives.solution_model import FlowMapModel
from soflow_core.objectives.total_derivative import DerivativeModel, TotalDerivative
from soflow_core.passes import Network, Passes
from soflow_core.random_source import RandomSource
from soflow_core.rows import choose_rows, per_row
from soflow_core.times import TimeDistribution


@dataclass(frozen=True)
class Start:
    """Rows of a batch on the path: x_t and v_c (B, C, H, W), t and s (B,), and labels after dropping."""

    x: Tensor
    velocity: Tensor
    t: Tensor
    s: Tensor
    labels: Tensor | None
    first: int
    """Number of leading rows with s = t."""
    scale: Tensor | None = None
    """(B,): guidance scale of each row, where it is a condition of the network; (B, 3) with its interval."""


def draw_pairs(
    source: RandomSource, distribution: TimeDistribution, velocity_rows: int
) -> tuple[Tensor, Tensor]:
    """-> t, s (n,): the larger and the smaller of two draws; s = t in the leading rows."""
    one = distribution.from_normal(source.normal())
    other = distribution.from_normal(source.normal())
    t = torch.maximum(one, other)
    s = torch.where(source.rows < velocity_rows, t, torch.minimum(one, other))
    return t, s


def guidance_pass(
    passes: Passes, start: Start, guidance: VelocityGuidance, use: Tensor
) -> tuple[Tensor, Tensor]:
    """-> v_u (B, C, H, W) of all rows and v_p of the rows after `first`, in one pass without gradient.

    v_p of the leading rows is the prediction that they are trained on, so it is not computed again.
    """
    first = start.first if guidance.kappa else len(start.x)
    assert start.labels is not None
    x = torch.cat([start.x, start.x[first:]])
    t = torch.cat([start.t, start.t[first:]])
    y = torch.cat([null_labels(len(start.x), x.device), start.labels[first:]])
    velocities = passes.forward_where(passes.low_precision, torch.cat([use, use[first:]]), x, t, t, y)
    predicted = velocities[len(start.x) :] if guidance.kappa else torch.zeros_like(start.x[start.first :])
    return velocities[: len(start.x)], predicted


def guided_target(
    passes: Passes, start: Start, guidance: VelocityGuidance, keep_sample: Tensor, prediction: Tensor
) -> Tensor:
    """-> v_g (B, C, H, W): guided inside the window, v_c outside it and where `keep_sample` (B,) holds.

    `prediction` (B, C, H, W) is F(x, t, s, y), which in the leading rows is the predicted velocity.
    """
    if start.labels is None or not guidance.active:
        return start.velocity
    use = guidance.inside(start.t) & ~keep_sample
    unconditional, rest = guidance_pass(passes, start, guidance, use)
    predicted = torch.cat([prediction[: start.first].detach(), rest])
    return choose_rows(use, guidance.velocity(start.velocity, unconditional, predicted), start.velocity)


def differential_target(
    passes: Passes,
    start: Start,
    velocity: Tensor,
    total_derivative: TotalDerivative,
    tangent: Tensor | None = None,
    factor: float | Tensor = 1.0,
) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): u_tgt = v - factor (t - s) du/dt, with the derivative taken in rows with s < t.

    The identity u = v - (t - s) du/dt is MeanFlow's (arXiv 2505.13447, Eq. 6). `tangent` (B, C, H, W) is the velocity
    along which x moves in du/dt, by default `velocity`.
    """
    first = start.first
    if first == len(start.x) and not passes.policy.uniform:
        return velocity
    t, s = start.t[first:], start.s[first:]
    labels = None if start.labels is None else start.labels[first:]
    along = (velocity if tangent is None else tangent)[first:]
    scale = None if start.scale is None else start.scale[first:]
    derivative = total_derivative(passes, (start.x[first:], t, s, labels), along, scale)
    gap = per_row(factor * (t - s).clamp(0, 1), derivative)
    return torch.cat([velocity[:first], velocity[first:] - gap * derivative])


class AverageVelocityModel(FlowMapModel):
    """The solution and the sampler that they have in common."""

    own_sampler: ClassVar[str] = "ode"

    def solution(self, network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """f(x, t, s) = x - (t - s) u(x, t, s)."""
        return x - per_row(t - s, x) * network(x, t, s, labels)


class DifferentialModel(DerivativeModel, AverageVelocityModel):
    """A method whose target holds the total derivative du/dt of the average velocity."""


class GuidedModel(DifferentialModel):
    """A method whose target is guided as MeanFlow's is."""

    guidance: VelocityGuidance
    """A setting of each of them."""

    @property
    def needs_null_label(self) -> bool:
        return self.guidance.drop > 0 or self.guidance.active

    @property
    def trained_guidance(self) -> float | None:
        return self.guidance.scale


def leading_rows(source: RandomSource, probability: float) -> Tensor:
    """-> (n,) bool: which rows are among the first m of the batch, m binomial, whose labels MeanFlow drops."""
    return source.rows < (source.common_uniform() < probability).sum()


def branch_means(draws: Draws, mse: Tensor) -> dict[str, Tensor]:
    """(B,) -> detached mean of each branch that has rows, to log."""
    parts = {"velocity_mse": mse[: draws.velocity_rows], "average_mse": mse[draws.velocity_rows :]}
    return {name: part.detach().mean() for name, part in parts.items() if len(part)}
