"""Distributions of training times, the middle time l between s and t, and its schedule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from soflow_core.registration import Registry, SectionPart, part_setting, register
from soflow_core.schedule_shapes import SHAPES
from soflow_core.settings import STRICT, check_values

MINIMAL_GAP = 1e-4
"""Lower bound of t, and of the distances of s and l from t, in the consistency branch (SoFlow)."""
OPEN = 2.0**-24
"""Smallest distance of a time from 0 and 1: 1 - OPEN is the largest float32 below 1."""


class TimeDistribution(SectionPart, ABC):
    """Distribution of training times: a frozen dataclass whose settings have defaults.

    A time is a function of one standard normal number, so that a method draws the same numbers whatever the distribution. Sweep files
    have it as a section, with its name as `kind`; one without is `logit_normal`.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: str
    """Given by `@register`."""

    @abstractmethod
    def from_normal(self, normal: Tensor) -> Tensor:
        """(B,) standard normal -> (B,) times above 0 and below 1, of the same type; a larger number gives no smaller time."""


TIMES: Registry[TimeDistribution] = Registry(
    "time distribution",
    TimeDistribution,  # type: ignore[type-abstract]
    "kind",
    default="logit_normal",
    section=True,
)


@register("logit_normal")
@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """Times in (0, 1) whose logit is normal."""

    mean: float = 0.0
    """Mean of the logit; below 0 favours times near the data."""
    std: float = 1.0
    """Standard deviation of the logit."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.std < 0:
            raise ValueError(f"a logit-normal std of {self.std} is negative; give 0 or more")

    def from_normal(self, normal: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * normal)


@register("uniform")
@dataclass(frozen=True)
class UniformTimes(TimeDistribution):
    """Times that are equally likely between two bounds."""

    low: float = 0.0
    """Lower bound."""
    high: float = 1.0
    """Upper bound."""

    def __post_init__(self) -> None:
        check_values(self)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"uniform times from low {self.low} to high {self.high}; give 0 <= low < high <= 1"
            )

    def from_normal(self, normal: Tensor) -> Tensor:
        time = self.low + (self.high - self.low) * torch.special.ndtr(normal)
        return time.clamp(OPEN, 1 - OPEN)


def consistency_times(start: Tensor, end: Tensor, gap: float = MINIMAL_GAP) -> tuple[Tensor, Tensor]:
    """(B,), (B,) -> t, s with t >= gap and s <= t - gap; a pair in the wrong order is clamped, not swapped."""
    t = start.clamp(min=gap)
    return t, torch.minimum(end, t - gap)


def middle_time(t: Tensor, s: Tensor, ratio: float | Tensor, gap: float = MINIMAL_GAP) -> Tensor:
    """(B,), (B,) -> (B,): l = t + (s - t) r, kept at least `gap` below t."""
    return torch.minimum(t + (s - t) * ratio, t - gap)


@dataclass(frozen=True)
class RatioSchedule:
    """Schedule of the middle-time ratio r(k, K) at step k of K: the middle time is l = t + (s - t) r."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    kind: str = part_setting(SHAPES, "exponential")
    """Shape of r between `initial` and `final`, a registered `ScheduleShape`; `constant` is `final` throughout."""
    initial: float = 0.1
    """r at step 0."""
    final: float = 0.002
    """r at step K."""

    def __post_init__(self) -> None:
        check_values(self)
        for name, value in (("initial", self.initial), ("final", self.final)):
            if not 0 < value <= 1:
                raise ValueError(
                    f"schedule.{name} is {value}; the middle-time ratio must be above 0 and at most 1"
                )

    def ratio(self, step: int, total_steps: int) -> float:
        """r after `step` finished steps of `total_steps`."""
        return SHAPES.named(self.kind).between(self.initial, self.final, step / total_steps)
