"""Interface of a sampler, by the function that it evaluates: a velocity, a solution or a predicted noise.

A sampler is one step; the loop over the steps is its base class's, whatever the time grid (`grids`). A method names the samplers it
can be sampled with by their base class, and chooses one of them by its setting `sampler`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from soflow_core.paths import PathPoint, linear
from soflow_core.registration import Registry
from soflow_core.samplers.grids import uniform_times

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): (B, C, H, W), (B,) -> (B, C, H, W)."""
Solve = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f(x, t, s): (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""eps(x, n): (B, C, H, W), (B,) step numbers as float32 -> (B, C, H, W)."""
Fresh = Callable[[], Tensor]
"""The noise (B, C, H, W) that is added at the end of a step, drawn when it is called. Raises ValueError where there is none."""

SamplerT = TypeVar("SamplerT", bound="Sampler")


class Sampler(ABC):
    """A way from noise to data: a frozen dataclass, a function of its arguments alone.

    It draws nothing: noise that is added between steps is given to it. Rows are independent. Every call of the function is an
    evaluation, and is counted as one for each of its rows.
    """

    name: str
    """Given by `@register`."""

    @abstractmethod
    def evaluations(self, steps: int) -> int:
        """Evaluations of the function in `steps` steps. Counted by running it; a sampler that knows them may say so."""


SAMPLERS: Registry[Sampler] = Registry("sampler", Sampler, "name")  # type: ignore[type-abstract]


class _Counter:
    """Stub for the function of a sampler that counts its rows."""

    rows = 0

    def __call__(self, x: Tensor, *times: Tensor) -> Tensor:
        del times
        self.rows += len(x)
        return x


class VelocitySampler(Sampler):
    """Solver of dx/dt = v(x, t) from t = 1 to t = 0."""

    @abstractmethod
    def step(self, velocity: Velocity, x: Tensor, start: float, end: float) -> Tensor:
        """x (B, C, H, W) at time `start` -> x at the smaller time `end`."""

    @torch.no_grad()
    def sample(self, velocity: Velocity, noise: Tensor, times: Sequence[float]) -> Tensor:
        """Noise (B, C, H, W) -> x0 (B, C, H, W), in steps between times that fall from 1 to 0."""
        x = noise
        for start, end in pairwise(times):
            x = self.step(velocity, x, start, end)
        return x

    def evaluations(self, steps: int) -> int:
        counter = _Counter()
        self.sample(counter, _NOTHING, uniform_times(steps))
        return counter.rows


class SolutionSampler(Sampler):
    """Sampler with a solution function f(x, t, s)."""

    @abstractmethod
    def step(
        self,
        solve: Solve,
        x: Tensor,
        start: float,
        end: float,
        fresh: Fresh,
        path: Callable[[Tensor], PathPoint],
    ) -> Tensor:
        """x (B, C, H, W) at time `start` -> x at the smaller time `end`; noise is added on `path`."""

    @torch.no_grad()
    def sample(
        self,
        solve: Solve,
        noise: Tensor,
        times: Sequence[float],
        renoise: Sequence[Tensor],
        path: Callable[[Tensor], PathPoint],
    ) -> Tensor:
        """Noise (B, C, H, W) -> x0 (B, C, H, W), in steps between times that fall from 1 to 0; renoise[i] is the noise of step i."""
        x = noise
        for place, (start, end) in enumerate(pairwise(times)):
            x = self.step(solve, x, start, end, fresh_noise(renoise, place, len(times) - 1), path)
        return x

    def evaluations(self, steps: int) -> int:
        counter = _Counter()
        self.sample(counter, _NOTHING, uniform_times(steps), [_NOTHING] * (steps - 1), linear)
        return counter.rows


class NoiseSampler(Sampler):
    """Sampler of a diffusion whose network predicts the noise."""

    @abstractmethod
    def step(
        self, predict: PredictNoise, x: Tensor, number: int, shares: tuple[float, float], fresh: Fresh
    ) -> Tensor:
        """x (B, C, H, W) at step number `number` -> x at the next one, or x0 at the end.

        `shares` are the data's shares of the variance (alpha bar) here and there, where 1 is the end.
        """

    @torch.no_grad()
    def sample(
        self,
        predict: PredictNoise,
        noise: Tensor,
        alpha_bar: Tensor,
        numbers: Sequence[int],
        renoise: Sequence[Tensor],
    ) -> Tensor:
        """Noise (B, C, H, W) -> x0 (B, C, H, W), evaluated at falling step numbers; renoise[i] is the noise of step i.

        `alpha_bar` (T,) float64 is the data's share of variance after each step.
        """
        x = noise
        for place, (number, following) in enumerate(zip(numbers, [*numbers[1:], None], strict=True)):
            there = 1.0 if following is None else float(alpha_bar[following])
            shares = float(alpha_bar[number]), there
            x = self.step(predict, x, number, shares, fresh_noise(renoise, place, len(numbers)))
        return x

    def evaluations(self, steps: int) -> int:
        counter = _Counter()
        alpha_bar = torch.linspace(0.99, 0.01, steps, dtype=torch.float64)
        numbers = list(reversed(range(steps)))
        self.sample(counter, _NOTHING, alpha_bar, numbers, [_NOTHING] * (steps - 1))
        return counter.rows


_NOTHING = torch.zeros(1, 1, 1, 1)
"""The sample of which evaluations are counted."""


def at_time(x: Tensor, time: float) -> Tensor:
    """(B, C, H, W) -> (B,) float32 on its device: the same time for every row."""
    return torch.full((x.shape[0],), time, device=x.device)


def fresh_noise(renoise: Sequence[Tensor], place: int, steps: int) -> Fresh:
    """The noise of the step with this place among `steps`, taken when it is called."""

    def fresh() -> Tensor:
        if place >= len(renoise):
            raise ValueError(f"{steps} steps need {steps - 1} noises in renoise; {len(renoise)} were given")
        return renoise[place]

    return fresh


def samplers_of(kind: type[SamplerT]) -> list[str]:
    """Names of the samplers with this base class."""
    return [name for name, part in SAMPLERS.items() if issubclass(part, kind)]


def sampler(kind: type[SamplerT], name: str) -> SamplerT:
    """The sampler of this name and base class."""
    found = SAMPLERS[name]()
    assert isinstance(found, kind)
    return found


def check_sampler(settings: object, kind: type[Sampler], name: str | None) -> None:
    """Raises ValueError where a method's setting `sampler` names none of this base class; None is the method's own."""
    if name is None or (name in SAMPLERS and issubclass(SAMPLERS[name], kind)):
        return
    known = ", ".join(map(repr, samplers_of(kind)))
    raise ValueError(f"{type(settings).__name__}.sampler is {name!r}; it is one of {known}")
