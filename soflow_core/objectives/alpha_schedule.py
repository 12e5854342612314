"""The schedule of alpha-Flow's alpha over training, whose shape is a registered part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from soflow_core.registration import Registry, part_setting, register
from soflow_core.settings import STRICT, check_values

LARGEST_EXPONENT = 700.0
"""Its exponential is still a float."""


class AlphaShape(ABC):
    """How alpha goes from 1 towards 0: a frozen dataclass whose settings have defaults."""

    name: str
    """Given by `@register`."""

    @abstractmethod
    def alpha(self, schedule: AlphaSchedule, progress: float) -> float:
        """alpha from 0 to 1 after a share `progress` of the training, with the settings of the schedule; it never rises."""


ALPHAS: Registry[AlphaShape] = Registry("alpha schedule", AlphaShape, "name")  # type: ignore[type-abstract]


@register("sigmoid")
@dataclass(frozen=True)
class SigmoidAlpha(AlphaShape):
    """A falling sigmoid between `start` and `end` (alpha-Flow, Algorithm 2); near 1 and 0 it is 1 and 0."""

    def alpha(self, schedule: AlphaSchedule, progress: float) -> float:
        centre = (schedule.start + schedule.end) / 2
        slope = schedule.steepness * (progress - centre) / (schedule.end - schedule.start)
        alpha = 1 - 1 / (1 + math.exp(min(-slope, LARGEST_EXPONENT)))
        if alpha > 1 - schedule.snap:
            return 1.0
        return 0.0 if alpha < schedule.snap else alpha


@register("constant")
@dataclass(frozen=True)
class ConstantAlpha(AlphaShape):
    """`value` throughout."""

    def alpha(self, schedule: AlphaSchedule, progress: float) -> float:
        del progress
        return schedule.value


@dataclass(frozen=True)
class AlphaSchedule:
    """Schedule of alpha over training: its shape, and the settings that shapes read."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: str = part_setting(ALPHAS, "sigmoid")
    """A registered `AlphaShape`."""
    start: float = 0.0
    """Share of training at which the sigmoid starts."""
    end: float = 1.0
    """Share of training at which it ends."""
    steepness: float = 25.0
    snap: float = 5e-3
    """alpha nearer than this to 1 or 0 becomes 1 or 0."""
    value: float = 0.01
    """alpha of the constant kind."""

    def __post_init__(self) -> None:
        check_values(self)
        if not 0 <= self.start < self.end:
            raise ValueError(f"an alpha schedule from {self.start} to {self.end}; give 0 <= start < end")
        if not 0 <= self.value <= 1:
            raise ValueError(f"schedule.value is {self.value}; alpha is from 0 to 1")
        if self.steepness <= 0:
            raise ValueError(f"schedule.steepness is {self.steepness}; it must be above 0, for alpha falls")
        if not 0 <= self.snap < 0.5:
            raise ValueError(f"schedule.snap is {self.snap}; give 0 to below 0.5")

    @property
    def reaches_zero(self) -> bool:
        """Whether alpha becomes 0, where the target needs the total derivative."""
        return self.alpha(1, 1) == 0

    def alpha(self, step: int, total_steps: int) -> float:
        """alpha after `step` finished steps."""
        return ALPHAS.named(self.kind).alpha(self, step / total_steps)
