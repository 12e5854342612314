"""Fixed-step ODE solvers of dx/dt = v(x, t) from t = 1 to t = 0."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from soflow_core.guidance import guide_prediction, null_labels
from soflow_core.passes import Network
from soflow_core.registration import register
from soflow_core.samplers.base import Velocity, VelocitySampler
from soflow_core.samplers.solution import uniform_times


@register("euler")
@dataclass(frozen=True)
class Euler(VelocitySampler):
    """First order, one evaluation a step."""

    def sample(self, velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
        return euler(velocity, noise, steps)


@register("heun")
@dataclass(frozen=True)
class Heun(VelocitySampler):
    """Second order, two evaluations a step."""

    def sample(self, velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
        return heun(velocity, noise, steps)


@torch.no_grad()
def euler(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): x <- x - h v(x, t); first order, one evaluation a step."""
    zero = torch.zeros(noise.shape[0], device=noise.device)
    x = noise
    for start, end in pairwise(uniform_times(steps)):
        x = x - (start - end) * velocity(x, zero + start)
    return x


@torch.no_grad()
def heun(velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): the trapezoid of an Euler step; second order, two evaluations a step."""
    zero = torch.zeros(noise.shape[0], device=noise.device)
    x = noise
    for start, end in pairwise(uniform_times(steps)):
        h = start - end
        first = velocity(x, zero + start)
        second = velocity(x - h * first, zero + end)
        x = x - h / 2 * (first + second)
    return x


def guided_prediction(network: Network, x: Tensor, t: Tensor, labels: Tensor | None, scale: float) -> Tensor:
    """(B, C, H, W), (B,), (B,) -> (B, C, H, W): F(x, t, t, y); where scale is not 1 guided, in a pass of 2 B rows."""
    if labels is None or scale == 1:
        return network(x, t, t, labels)
    both = torch.cat([labels, null_labels(x.shape[0], x.device)])
    twice = torch.cat([t, t])
    conditional, unconditional = network(torch.cat([x, x]), twice, twice, both).chunk(2)
    return guide_prediction(conditional, unconditional, scale)
