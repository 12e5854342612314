"""Settings of `search`: the space, the budgets, the scheduler, and the metric that trials are compared by."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from soflow_platform.config.sections import Positive, Section

MAX_TRIALS = 1000
"""Trials of one sweep: each is checked before anything starts."""


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
