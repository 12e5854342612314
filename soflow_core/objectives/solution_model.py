"""How methods that learn the solution f(x, t, s) are sampled: the settings, and `sample`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from soflow_core.objectives.step_times import SteppedModel
from soflow_core.passes import Network, at_scale
from soflow_core.paths import PathPoint, linear
from soflow_core.samplers.base import SolutionSampler, check_sampler, sampler
from soflow_core.settings import setting


@dataclass(frozen=True)
class SolutionModel(SteppedModel):
    """A method that learns f(x, t, s), or f(x, t, 0) alone. Subclasses that check their own settings call `super()`."""

    own_sampler: ClassVar[str] = "consistency"
    """How the method's own code samples."""

    @property
    def solution_sampler(self) -> str:
        """How it is sampled."""
        return self.own_sampler

    @property
    def used_sampler(self) -> SolutionSampler:
        return sampler(SolutionSampler, self.solution_sampler)  # type: ignore[type-abstract]

    @abstractmethod
    def solution(self, network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """f(x, t, s): (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""

    @property
    def noising_path(self) -> Callable[[Tensor], PathPoint]:
        """The path on which noise is added again."""
        return linear

    def sample(
        self,
        network: Network,
        noise: Tensor,
        labels: Tensor | None,
        steps: int,
        renoise: Sequence[Tensor] = (),
    ) -> Tensor:
        scale = self.trained_guidance if self.conditions_on_scale and labels is not None else None
        conditioned = at_scale(network, scale, noise, self.sampled_interval)

        def solve(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return self.solution(conditioned, x, t, s, labels)

        times = self.step_times(steps)
        return self.used_sampler.sample(solve, noise, times, renoise, self.noising_path)


@dataclass(frozen=True)
class FlowMapModel(SolutionModel):
    """A method that learns f(x, t, s) at every s, so that it can be sampled in two ways."""

    sampler: str | None = setting(None, inert=True, sampling=True)
    """None is how the method's own code samples."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampler(self, SolutionSampler, self.sampler)  # type: ignore[type-abstract]

    @property
    def solution_sampler(self) -> str:
        return self.sampler or self.own_sampler
