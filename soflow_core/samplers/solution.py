"""Samplers with a solution function f(x, t, s)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from soflow_core.paths import PathPoint
from soflow_core.registration import register
from soflow_core.samplers.base import Fresh, SolutionSampler, Solve, at_time


@register("consistency")
@dataclass(frozen=True)
class ConsistencySampler(SolutionSampler):
    """Solves to t = 0 and adds noise up to the next time."""

    def step(
        self,
        solve: Solve,
        x: Tensor,
        start: float,
        end: float,
        fresh: Fresh,
        path: Callable[[Tensor], PathPoint],
    ) -> Tensor:
        x0 = solve(x, at_time(x, start), at_time(x, 0.0))
        return x0 if end == 0 else path(at_time(x, end)).state(x0, fresh())

    def evaluations(self, steps: int) -> int:
        return steps


@register("ode")
@dataclass(frozen=True)
class StepSampler(SolutionSampler):
    """Solves from each time to the next, along one trajectory without new noise."""

    def step(
        self,
        solve: Solve,
        x: Tensor,
        start: float,
        end: float,
        fresh: Fresh,
        path: Callable[[Tensor], PathPoint],
    ) -> Tensor:
        del fresh, path
        return solve(x, at_time(x, start), at_time(x, end))

    def evaluations(self, steps: int) -> int:
        return steps
