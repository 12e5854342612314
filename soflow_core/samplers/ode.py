"""Fixed-step ODE solvers of dx/dt = v(x, t) from t = 1 to t = 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_core.guidance import guide_prediction, null_labels
from soflow_core.passes import Network
from soflow_core.registration import register
from soflow_core.samplers.base import Velocity, VelocitySampler, at_time


@register("euler")
@dataclass(frozen=True)
class Euler(VelocitySampler):
    """First order, one evaluation a step."""

    def step(self, velocity: Velocity, x: Tensor, start: float, end: float) -> Tensor:
        """x - h v(x, t)."""
        return x - (start - end) * velocity(x, at_time(x, start))

    def evaluations(self, steps: int) -> int:
        return steps


@register("heun")
@dataclass(frozen=True)
class Heun(VelocitySampler):
    """Second order, two evaluations a step."""

    def step(self, velocity: Velocity, x: Tensor, start: float, end: float) -> Tensor:
        """The trapezoid of an Euler step."""
        h = start - end
        first = velocity(x, at_time(x, start))
        second = velocity(x - h * first, at_time(x, end))
        return x - h / 2 * (first + second)

    def evaluations(self, steps: int) -> int:
        return 2 * steps


def guided_prediction(network: Network, x: Tensor, t: Tensor, labels: Tensor | None, scale: float) -> Tensor:
    """(B, C, H, W), (B,), (B,) -> (B, C, H, W): F(x, t, t, y); where scale is not 1 guided, in a pass of 2 B rows."""
    if labels is None or scale == 1:
        return network(x, t, t, labels)
    both = torch.cat([labels, null_labels(x.shape[0], x.device)])
    twice = torch.cat([t, t])
    conditional, unconditional = network(torch.cat([x, x]), twice, twice, both).chunk(2)
    return guide_prediction(conditional, unconditional, scale)
