"""Interface of a sampler, by the function that it evaluates: a velocity, a solution or a predicted noise.

A method names the samplers it can be sampled with by their base class, and chooses one of them by its setting `sampler`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from soflow_core.paths import PathPoint
from soflow_core.registration import Registry

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): (B, C, H, W), (B,) -> (B, C, H, W)."""
Solve = Callable[[Tensor, Tensor, Tensor], Tensor]
"""f(x, t, s): (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
PredictNoise = Callable[[Tensor, Tensor], Tensor]
"""eps(x, n): (B, C, H, W), (B,) step numbers as float32 -> (B, C, H, W)."""


SamplerT = TypeVar("SamplerT", bound="Sampler")


class Sampler(ABC):
    """A way from noise to data: a frozen dataclass, a function of its arguments alone.

    It draws nothing: noise that is added between steps is `renoise`, of which step i adds the i-th. Rows are independent. Every call
    of the function is an evaluation, and is counted as one.
    """

    name: str
    """Given by `@register`."""


SAMPLERS: Registry[Sampler] = Registry("sampler", Sampler, "name")


class VelocitySampler(Sampler):
    """Solver of dx/dt = v(x, t) from t = 1 to t = 0."""

    @abstractmethod
    def sample(self, velocity: Velocity, noise: Tensor, steps: int) -> Tensor:
        """Noise (B, C, H, W) -> x0 (B, C, H, W)."""


class SolutionSampler(Sampler):
    """Sampler with a solution function f(x, t, s)."""

    @abstractmethod
    def sample(
        self,
        solve: Solve,
        noise: Tensor,
        times: Sequence[float],
        renoise: Sequence[Tensor],
        path: Callable[[Tensor], PathPoint],
    ) -> Tensor:
        """Noise (B, C, H, W) -> x0 (B, C, H, W); `times` go from 1 to 0, noise is added again on `path`."""


class NoiseSampler(Sampler):
    """Sampler of a diffusion whose network predicts the noise."""

    @abstractmethod
    def sample(
        self, predict: PredictNoise, noise: Tensor, alpha_bar: Tensor, steps: int, renoise: Sequence[Tensor]
    ) -> Tensor:
        """Noise (B, C, H, W) -> x0 (B, C, H, W); `alpha_bar` (T,) float64 is the data's share of variance after each step."""


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
