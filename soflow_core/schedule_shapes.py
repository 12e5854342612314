"""Shapes of schedules: how a value goes from one to another over a training. A shape is a registered part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from soflow_core.registration import Registry, register


class ScheduleShape(ABC):
    """A way between two values: a frozen dataclass without settings."""

    name: str
    """Given by `@register`."""

    @abstractmethod
    def between(self, start: float, end: float, progress: float) -> float:
        """The value after a share `progress` of the training, from 0 to 1; `start` and `end` are above 0."""


SHAPES: Registry[ScheduleShape] = Registry("schedule shape", ScheduleShape, "name")  # type: ignore[type-abstract]


@register("constant")
@dataclass(frozen=True)
class Constant(ScheduleShape):
    """The last value throughout."""

    def between(self, start: float, end: float, progress: float) -> float:
        del start, progress
        return end


@register("linear")
@dataclass(frozen=True)
class Linear(ScheduleShape):
    """Equal differences."""

    def between(self, start: float, end: float, progress: float) -> float:
        return start + (end - start) * progress


@register("cosine")
@dataclass(frozen=True)
class Cosine(ScheduleShape):
    """Half a cosine: slow at both ends."""

    def between(self, start: float, end: float, progress: float) -> float:
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@register("exponential")
@dataclass(frozen=True)
class Exponential(ScheduleShape):
    """Equal quotients."""

    def between(self, start: float, end: float, progress: float) -> float:
        return float(start * (end / start) ** progress)
