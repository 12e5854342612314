"""Settings of `search`: the space, the budgets, the scheduler, and the metric that trials are compared by."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from soflow_platform.config.sections import Positive, Section

MAX_TRIALS = 1000
"""Trials of one sweep: each is checked before anything starts."""
POINT_NAME = re.compile(r"[A-Za-z0-9][\w.=+-]{0,59}")
"""Name of a point of `first`, which becomes part of the name of its trial."""


class Range(Section):
    """A continuous range to draw from."""

    uniform: tuple[float, float] | None = None
    log_uniform: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        given = [r for r in (self.uniform, self.log_uniform) if r is not None]
        if len(given) != 1 or given[0][0] >= given[0][1]:
            raise ValueError(
                "a range is {uniform: [low, high]} or {log_uniform: [low, high]} with low < high"
            )
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("the low end of log_uniform must be above 0")
        return self


class AshaConfig(Section):
    """Asynchronous successive halving: the worse trials stop at rungs, compared at equal steps of an equal K."""

    first_rung: Positive
    """Steps before the first comparison."""
    reduction: Annotated[int, Field(ge=2)] = 3


Budget = Literal["steps", "evaluations"]
"""Budget that trials have in common: optimizer steps, or evaluations of the network."""


class SearchConfig(Section):
    """Which settings vary, and what decides between trials."""

    space: dict[str, list[Any] | Range] = Field(default_factory=dict)
    """From a setting's path (`objective.weight_power`) to the values it takes, or a range."""
    first: Annotated[tuple[dict[str, Any], ...], Field(max_length=MAX_TRIALS)] = ()
    """Points that are trained before those of `space`: from a setting's path to its value; `{}` is the file as it is written. A `name`
    beside the settings names the trial."""
    algorithm: Literal["grid", "random"] = "grid"
    trials: Annotated[int, Field(gt=0, le=MAX_TRIALS)] | None = None
    """Number of trials that `random` draws; `grid` tries every combination."""
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] = ("steps",)
    """`steps`: every trial trains for `training.steps`. `evaluations`: for as many steps as make the network evaluations that the
    file's own settings make in `training.steps`. With both, every point is trained once for each, and once for both where they come to
    the same steps."""
    metric: str = "eval/fd_nfe1"
    mode: Literal["min", "max"] | None = None
    """None: the metric's own direction."""
    asha: AshaConfig | None = None

    @model_validator(mode="after")
    def _names_of_points(self) -> SearchConfig:
        names = [point["name"] for point in self.first if "name" in point]
        for name in names:
            if not isinstance(name, str) or not POINT_NAME.fullmatch(name):
                raise ValueError(
                    f"a name in `first` is up to 60 letters, digits and `_ . = + -`, not {str(name)[:80]!r}"
                )
            if names.count(name) > 1:
                raise ValueError(f"`first` has two points of the name {name!r}: rename one")
        return self

    @model_validator(mode="after")
    def _algorithm_fits(self) -> SearchConfig:
        ranges = [key for key, values in self.space.items() if isinstance(values, Range)]
        if self.algorithm == "grid" and ranges:
            raise ValueError(
                f"`{ranges[0]}` is a range: a grid needs a list of values, or set algorithm: random"
            )
        if self.algorithm == "grid" and self.trials is not None:
            raise ValueError("`trials` is for algorithm: random; a grid tries every combination")
        if self.algorithm == "random" and self.trials is None:
            raise ValueError("algorithm: random needs `trials`, the number of trials to draw")
        points = math.prod(len(values) for values in self.space.values() if isinstance(values, list))
        if self.algorithm == "grid" and points > MAX_TRIALS:
            raise ValueError(
                f"the grid of `space` has {points} points: a sweep has at most {MAX_TRIALS} trials; "
                "list fewer values, or draw with algorithm: random"
            )
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("`budgets` names one twice; keep one")
        if self.asha is not None and self.budgets != ("steps",):
            raise ValueError("`asha` compares trials at equal steps: leave `budgets` out")
        empty = [key for key, values in self.space.items() if isinstance(values, list) and not values]
        if empty:
            raise ValueError(f"`{empty[0]}` lists no values")
        return self
