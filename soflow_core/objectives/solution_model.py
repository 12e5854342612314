"""How methods that learn the solution f(x, t, s) are sampled: the settings, and `sample`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from soflow_core.objectives.base import Objective
from soflow_core.passes import Network, at_scale
from soflow_core.paths import PathPoint, linear
from soflow_core.samplers.base import SolutionSampler, check_sampler, sampler
from soflow_core.samplers.solution import (
    check_times,
    uniform_times,
)
from soflow_core.settings import check_values


@dataclass(frozen=True)
class SolutionModel(Objective):
    """A method that learns f(x, t, s), or f(x, t, 0) alone. Subclasses that check their own settings call `super()`."""

    sampling_times: tuple[float, ...] | None = None
    """Times between 1 and 0, falling, at which the steps of sampling end, for sampling in one step more than there
    are times. None, and other numbers of steps, are even steps.
    """

    own_sampler: ClassVar[str] = "consistency"
    """How the method's own code samples."""

    def __post_init__(self) -> None:
        check_values(self)
        check_times(self.sampling_times or ())

    @property
    def solution_sampler(self) -> str:
        """How it is sampled."""
        return self.own_sampler

    @abstractmethod
    def solution(self, network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """f(x, t, s): (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""

    @property
    def noising_path(self) -> Callable[[Tensor], PathPoint]:
        """The path on which noise is added again."""
        return linear

    def step_times(self, steps: int) -> list[float]:
        """Times from 1 to 0 between the steps of sampling. Raises ValueError for less than one step."""
        if self.sampling_times is not None and steps == len(self.sampling_times) + 1:
            return [1.0, *self.sampling_times, 0.0]
        return uniform_times(steps)

    def sample(
        self,
        network: Network,
        noise: Tensor,
        labels: Tensor | None,
        steps: int,
        renoise: Sequence[Tensor] = (),
    ) -> Tensor:
        scale = self.trained_guidance if self.conditions_on_scale and labels is not None else None
        conditioned = at_scale(network, scale, noise)

        def solve(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return self.solution(conditioned, x, t, s, labels)

        times = self.step_times(steps)
        chosen = sampler(SolutionSampler, self.solution_sampler)  # type: ignore[type-abstract]
        return chosen.sample(solve, noise, times, renoise, self.noising_path)


@dataclass(frozen=True)
class FlowMapModel(SolutionModel):
    """A method that learns f(x, t, s) at every s, so that it can be sampled in two ways."""

    sampler: str | None = None
    """None is how the method's own code samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampler(self, SolutionSampler, self.sampler)

    @property
    def solution_sampler(self) -> str:
        return self.sampler or self.own_sampler
