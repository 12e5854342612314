"""Dimensions of a search space: how one setting varies, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Annotated, Any

from pydantic import Field, model_validator

from soflow_platform.config.sections import Section

Integer = Annotated[int, Field(ge=-(10**15), le=10**15)]
Values = Annotated[list[Any], Field(min_length=1)]
KINDS = ("uniform", "log_uniform", "integer", "normal", "choice", "grid")


class Dimension(Section):
    """How one setting varies: one of the kinds, and the settings of a trial in which it does."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None
    """[low, high], both above 0; uniform in the logarithm."""
    integer: tuple[Integer, Integer] | None = None
    """[low, high], both included."""
    normal: tuple[float, float] | None = None
    """[mean, std]."""
    choice: Values | None = None
    """Values of which one is drawn."""
    grid: Values | None = None
    """Values that are all tried, with the same draws of the other settings."""
    when: dict[str, Any] | None = None
    """Other settings and the value, or list of values, with which this one varies; without them it stays as the file has it."""

    @model_validator(mode="after")
    def _one_kind(self) -> Dimension:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                "a setting varies in one way: {uniform: [low, high]}, {log_uniform: [low, high]}, {integer: [low, high]}, "
                "{normal: [mean, std]}, {choice: [...]} or {grid: [...]}"
            )
        bounds = self.uniform or self.log_uniform or self.integer
        if bounds is not None and bounds[0] >= bounds[1]:
            raise ValueError(f"`{given[0]}` is [low, high] with low < high")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("the low end of log_uniform must be above 0")
        if self.normal is not None and self.normal[1] <= 0:
            raise ValueError("`normal` is [mean, std] with std above 0")
        if self.when == {}:
            raise ValueError("`when` names no setting: leave it out")
        return self

    @property
    def values(self) -> list[Any] | None:
        """Its values, where it has a list of them."""
        return self.choice if self.grid is None else self.grid

    def at(self, quantile: float) -> Any:
        """The value at a quantile, in [0, 1), of its distribution."""
        values = self.values
        if values is not None:
            return values[min(int(quantile * len(values)), len(values) - 1)]
        if self.integer is not None:
            low, high = self.integer
            return min(low + int(quantile * (high - low + 1)), high)
        if self.normal is not None:
            return NormalDist(*self.normal).inv_cdf(min(max(quantile, 1e-9), 1 - 1e-9))
        if self.log_uniform is not None:
            first, last = self.log_uniform
            value = math.exp(math.log(first) + quantile * (math.log(last) - math.log(first)))
            return min(max(value, first), last)
        assert self.uniform is not None
        return self.uniform[0] + quantile * (self.uniform[1] - self.uniform[0])

    def quantile(self, value: Any) -> float | None:
        """The quantile of a value; None for one that it cannot take."""
        if self.values is not None:
            return (self.values.index(value) + 0.5) / len(self.values) if value in self.values else None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if self.normal is not None:
            return NormalDist(*self.normal).cdf(value)
        bounds = self.uniform or self.log_uniform or self.integer
        assert bounds is not None
        low, high = bounds
        if not low <= value <= high:
            return None
        if self.integer is not None:
            return (value - low + 0.5) / (high - low + 1) if value == int(value) else None
        if self.log_uniform is not None:
            return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
        return (value - low) / (high - low)


def dimension_of(values: list[Any] | Dimension, algorithm: str) -> Dimension:
    """A dimension as it was written: a bare list is all its values for a grid, and a choice for the other algorithms."""
    if isinstance(values, Dimension):
        return values
    return (
        Dimension.model_construct(grid=values)
        if algorithm == "grid"
        else Dimension.model_construct(choice=values)
    )


def in_order(space: Mapping[str, Dimension]) -> list[str]:
    """The keys of a space, each after those that its `when` names. Raises ValueError for a circle."""
    left, done = list(space), []
    while left:
        ready = [key for key in left if not _waits(space[key].when or {}, left)]
        if not ready:
            raise ValueError(f"`when` of {', '.join(f'`{key}`' for key in left)} goes in a circle")
        done.append(ready[0])
        left.remove(ready[0])
    return done


def _waits(when: Mapping[str, Any], left: list[str]) -> bool:
    """Whether a condition names a setting of `left`, or one within a section there."""
    return any(named == key or named.startswith(f"{key}.") for named in when for key in left)
