"""Shapes of schedules: how a value goes from one to another over a training. A shape is a registered part.

Settings name one as `NAME`, or as `NAME:VALUE` where it has one setting, a number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from soflow_core.registration import Registry, register


class ScheduleShape(ABC):
    """A way between two values above 0: a frozen dataclass whose settings have defaults. It never turns, and ends at the second."""

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


class DecayShape(ABC):
    """How a learning rate falls after its warm-up: a frozen dataclass whose settings have defaults."""

    name: str
    """Given by `@register`."""

    @abstractmethod
    def share(self, progress: float) -> float:
        """The share of the way from the highest to the last rate that is done after a share `progress` of it.

        It rises from 0 at 0 to 1 at 1, or is 0 throughout.
        """


DECAYS: Registry[DecayShape] = Registry("learning rate decay", DecayShape, "name")  # type: ignore[type-abstract]


@register("constant")
@dataclass(frozen=True)
class NoDecay(DecayShape):
    """The highest rate throughout."""

    def share(self, progress: float) -> float:
        del progress
        return 0.0


@register("linear")
@dataclass(frozen=True)
class LinearDecay(DecayShape):
    """A straight line."""

    def share(self, progress: float) -> float:
        return progress


@register("cosine")
@dataclass(frozen=True)
class CosineDecay(DecayShape):
    """Half a cosine: slow at both ends."""

    def share(self, progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2
