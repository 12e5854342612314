"""Time grids: where the steps of sampling end, for any number of steps.

A method is sampled on a grid by its setting `sampling_grid`: `NAME`, or `NAME:VALUE` for the grid's own setting.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from soflow_core.registration import Registry, register
from soflow_core.settings import check_values


class TimeGrid(ABC):
    """Times between noise (1) and data (0): a frozen dataclass of numbers."""

    name: str
    """Given by `@register`."""
    tried: ClassVar[tuple[float, ...]] = ()
    """Values of the grid's own setting that a search for a grid tries beside its default."""

    @abstractmethod
    def time(self, share: float) -> float:
        """The time after a share of the steps: falls from 1 at 0 to 0 at 1."""

    def times(self, steps: int) -> list[float]:
        """-> steps + 1 times from 1 to 0. Raises ValueError for less than one step, and where they do not fall."""
        times = [self.time(1 - time) for time in uniform_times(steps)]
        check_times(times[1:-1], f"times of the grid {self.name}")
        return [1.0, *times[1:-1], 0.0]


GRIDS: Registry[TimeGrid] = Registry("time grid", TimeGrid, "name")  # type: ignore[type-abstract]


@register("uniform")
@dataclass(frozen=True)
class UniformGrid(TimeGrid):
    """Even steps."""

    def time(self, share: float) -> float:
        return 1 - share

    def times(self, steps: int) -> list[float]:
        return uniform_times(steps)


@register("power")
@dataclass(frozen=True)
class PowerGrid(TimeGrid):
    """t = (1 - i / N)^power: above 1 the steps are shorter near the data, below 1 near the noise."""

    power: float = 2.0
    tried: ClassVar[tuple[float, ...]] = (0.5, 0.7, 1.4, 3.0)

    def __post_init__(self) -> None:
        check_values(self)
        if self.power <= 0:
            raise ValueError(f"power is {self.power}; it must be above 0")

    def time(self, share: float) -> float:
        return float((1 - share) ** self.power)


@register("shifted")
@dataclass(frozen=True)
class ShiftedGrid(TimeGrid):
    """t = m u / (1 + (m - 1) u) of even times u: above 1 the steps are shorter near the noise (arXiv 2403.03206, Eq. 23)."""

    shift: float = 3.0
    """m."""
    tried: ClassVar[tuple[float, ...]] = (0.25, 0.5, 2.0, 5.0)

    def __post_init__(self) -> None:
        check_values(self)
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}; it must be above 0")

    def time(self, share: float) -> float:
        even = 1 - share
        return self.shift * even / (1 + (self.shift - 1) * even)


def time_grid(text: str) -> TimeGrid:
    """The grid of `NAME` or `NAME:VALUE`. Raises ValueError that says which there are."""
    name = text.partition(":")[0]
    if name not in GRIDS:
        raise ValueError(f"sampling_grid is {text!r}; the time grids are {', '.join(GRIDS)}")
    try:
        return GRIDS.named(text)
    except ValueError as error:
        raise ValueError(f"sampling_grid is {text!r}: {error}; give {name}, or {name}:NUMBER") from None


def grids_to_try() -> list[str]:
    """Every registered grid, by its default and by the values that it names: `uniform`, `power`, `power:0.5`, ..."""
    return [
        name if value is None else f"{name}:{value:g}"
        for name, part in GRIDS.items()
        for value in (None, *part.tried)
    ]


def uniform_times(steps: int) -> list[float]:
    """Times 1, 1 - 1/N, ..., 0 of N steps. Raises ValueError for less than one step."""
    if steps < 1:
        raise ValueError(f"{steps} sampling steps were asked for; at least 1 is needed")
    return [1 - i / steps for i in range(steps)] + [0.0]


def check_times(between: Sequence[float], name: str = "sampling_times") -> None:
    """Raises ValueError where times between 1 and 0 do not fall from one to the next."""
    if any(end >= start for start, end in pairwise([1.0, *between, 0.0])):
        given = ", ".join(f"{time:g}" for time in between)
        raise ValueError(f"{name} are {given}; give times between 1 and 0, each below the one before")
