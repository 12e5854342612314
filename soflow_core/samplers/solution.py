"""Samplers with a solution function f(x, t, s)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from soflow_core.paths import PathPoint
from soflow_core.registration import register
from soflow_core.samplers.base import SolutionSampler, Solve


@register("consistency")
@dataclass(frozen=True)
class ConsistencySampler(SolutionSampler):
    """Solves to t = 0 and adds noise up to the next time."""

    def sample(
        self,
        solve: Solve,
        noise: Tensor,
        times: Sequence[float],
        renoise: Sequence[Tensor],
        path: Callable[[Tensor], PathPoint],
    ) -> Tensor:
        return sample_with_renoising(solve, noise, times, renoise, path)


@register("ode")
@dataclass(frozen=True)
class StepSampler(SolutionSampler):
    """Solves from each time to the next."""

    def sample(
        self,
        solve: Solve,
        noise: Tensor,
        times: Sequence[float],
        renoise: Sequence[Tensor],
        path: Callable[[Tensor], PathPoint],
    ) -> Tensor:
        del renoise, path
        return sample_by_steps(solve, noise, times)


def uniform_times(steps: int) -> list[float]:
    """Times 1, 1 - 1/N, ..., 0 of N steps. Raises ValueError for less than one step."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps were asked for; at least 1 is needed")
    return [1 - i / steps for i in range(steps)] + [0.0]


def check_times(between: Sequence[float]) -> None:
    """Raises ValueError where times between 1 and 0 do not fall from one to the next."""
    if any(end >= start for start, end in pairwise([1.0, *between, 0.0])):
        given = ", ".join(f"{time:g}" for time in between)
        raise ValueError(f"sampling_times are {given}; give times between 1 and 0, each below the one before")


@torch.no_grad()
def sample_with_renoising(
    solve: Solve,
    noise: Tensor,
    times: Sequence[float],
    renoise: Sequence[Tensor],
    path: Callable[[Tensor], PathPoint],
) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): x0 = f(x, t, 0), then repeatedly add noise up to the next time and solve again.

    `times` go from 1 to 0, with an evaluation at each but the last; renoise[i] is the noise added after evaluation i.
    Raises ValueError for too few.
    """
    steps = len(times) - 1
    if len(renoise) < steps - 1:
        raise ValueError(f"{steps} steps need {steps - 1} noises in renoise; {len(renoise)} were given")
    zero = torch.zeros(noise.shape[0], device=noise.device)
    x0 = solve(noise, zero + times[0], zero)
    for time, fresh in zip(times[1:-1], renoise, strict=False):
        t = zero + time
        x0 = solve(path(t).state(x0, fresh), t, zero)
    return x0


@torch.no_grad()
def sample_by_steps(solve: Solve, noise: Tensor, times: Sequence[float]) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): steps f(x, t_i, t_{i+1}) from 1 to 0 along one trajectory, without new noise."""
    zero = torch.zeros(noise.shape[0], device=noise.device)
    x = noise
    for start, end in pairwise(times):
        x = solve(x, zero + start, zero + end)
    return x
