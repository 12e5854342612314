"""Settings of `search`: the space, the algorithm, the budgets, the scheduler, and the metric that trials are compared by."""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from soflow_core.objectives import OBJECTIVES
from soflow_platform.config.constraints import Constraint
from soflow_platform.config.dimensions import Dimension, dimension_of, in_order
from soflow_platform.config.sections import Positive, Section

MAX_TRIALS = 1000
"""Trials of one sweep: each is checked before anything starts."""
POINT_NAME = re.compile(r"[A-Za-z0-9][\w.=+-]{0,59}")
"""Name of a point of `first`, which becomes part of the name of its trial."""


class AshaConfig(Section):
    """Asynchronous successive halving: the worse trials stop at rungs, compared at equal shares k / K of their trainings."""

    first_rung: Positive
    """Steps of `training.steps` before the first comparison; a trial of another length is compared at the same share of its own."""
    reduction: Annotated[int, Field(ge=2)] = 3
    metric: str | None = None
    """What trials are compared by at rungs; None: `search.metric`, by which the sweep is ranked."""


class PbtConfig(Section):
    """Population-based training: at rungs the worse trials go on from checkpoints of better ones, with settings moved from theirs."""

    every: Positive
    """Steps between rungs, at which all trials have seen equally many images."""
    replaced: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """Share of the population that is replaced at a rung, the worst, by copies of as many of the best."""
    move: Annotated[float, Field(gt=0, le=0.5)] = 0.2
    """How far a setting moves, up or down: a share of its distribution; one of a list goes to a neighbour."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability with which a setting is drawn anew instead."""
    metric: str | None = None
    """What trials are compared by at rungs; None: `search.metric`, by which the sweep is ranked."""


class StopLimits(Section):
    """Limits of a metric beyond which a trial is ended."""

    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _has_a_limit(self) -> StopLimits:
        if self.above is None and self.below is None:
            raise ValueError("a rule of `stop` is nan, {above: value} or {below: value}")
        return self


StopRule = Literal["nan"] | StopLimits
LOGGED_METRICS = ("train/loss", "train/grad_norm")
"""Metrics of the training, beside those of evaluations, that rules of `stop` may name."""


class FinalConfig(Section):
    """The best points again, with seeds that no trial had before; one of these trials is registered."""

    best: Positive = 3
    """Points that are trained again."""
    seeds: Positive = 3
    """Seeds for each of them."""
    of_each: str | None = None
    """A setting that varies: the best points of each of its values are trained again, such as each method's; None: the best of all."""
    metrics: dict[str, str] = Field(default_factory=dict)
    """From a method to the metric that its points are ranked by, where that is not `search.metric`; with `of_each: objective`."""


LATER_FINAL_SETTINGS: dict[str, Any] = {"of_each": None, "metrics": {}}
"""Settings that `search.final` has got later, with the values at which nothing changes: they are no part of a sweep's digest."""


Algorithm = Literal["grid", "random", "sobol", "tpe"]
"""`grid`: every combination. `random`: independent draws. `sobol`: a scrambled Sobol sequence, which fills the space evenly. `tpe`:
after some of these, points that Optuna's TPE proposes from the trials so far."""
TRAINING_SECONDS = "train_seconds"
"""Name of the training time, in seconds of one worker's devices, as an objective."""
Budget = Literal["steps", "evaluations"]
"""Budget that trials have in common: optimizer steps, or evaluations of the network."""


class SearchConfig(Section):
    """Which settings vary, and what decides between trials."""

    space: dict[str, list[Any] | Dimension] = Field(default_factory=dict)
    """From a setting's path (`objective.weight_power`) to the values it takes, or how it varies."""
    constraints: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    """Conditions between settings: `objective.schedule.final < objective.schedule.initial`. Points that break one are not trained."""
    first: Annotated[tuple[dict[str, Any], ...], Field(max_length=MAX_TRIALS)] = ()
    """Points that are trained before those of `space`: from a setting's path to its value; `{}` is the file as it is written. A `name`
    beside the settings names the trial."""
    algorithm: Algorithm = "grid"
    trials: Annotated[int, Field(gt=0, le=MAX_TRIALS)] | None = None
    """Number of points that are drawn; `grid` tries every combination."""
    seeds: Annotated[int, Field(gt=0, le=MAX_TRIALS)] = 1
    """Seeds with which every point is trained, from `seed` on; points are compared by their mean."""
    startup: Positive = 10
    """Points of a Sobol sequence with which `tpe` begins."""
    final: FinalConfig | None = None
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] = ("steps",)
    """`steps`: every trial trains for `training.steps`. `evaluations`: for as many steps as make the network evaluations that the
    file's own settings make in `training.steps`. With both, every point is trained once for each, and once for both where they come to
    the same steps."""
    metric: str = "eval/fd_nfe1"
    mode: Literal["min", "max"] | None = None
    """None: the metric's own direction."""
    objectives: Annotated[tuple[str, ...], Field(max_length=4)] = ()
    """What `tpe` looks for beside `metric`: other metrics that are reported, or `train_seconds`."""
    asha: AshaConfig | None = None
    pbt: PbtConfig | None = None
    stop: dict[str, StopRule] = Field(default_factory=dict)
    """When a trial that diverges is ended: `{train/loss: nan}`, `{eval/fd_nfe1: {above: 500}}`."""

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
        empty = [key for key, values in self.space.items() if values == []]
        if empty:
            raise ValueError(f"`{empty[0]}` lists no values")
        dimensions = self.dimensions()
        in_order(dimensions)
        drawn = [key for key, dimension in dimensions.items() if dimension.grid is None]
        if self.algorithm == "grid" and drawn:
            raise ValueError(
                f"`{drawn[0]}` is a range: a grid needs a list of values, or set algorithm: random"
            )
        if self.algorithm == "grid" and self.trials is not None:
            raise ValueError("`trials` is for algorithms that draw; a grid tries every combination")
        if self.algorithm == "tpe" and len(drawn) < len(dimensions):
            raise ValueError("algorithm: tpe takes no `grid` of a setting: make it a `choice`")
        if self.algorithm == "tpe" and not dimensions:
            raise ValueError("algorithm: tpe needs a `space` to search in")
        if self.algorithm != "grid" and self.trials is None:
            raise ValueError(f"algorithm: {self.algorithm} needs `trials`, the number of trials to draw")
        grid = math.prod(len(dimension.grid) for dimension in dimensions.values() if dimension.grid)
        points = grid * (self.trials or 1) * self.seeds
        if points > MAX_TRIALS:
            raise ValueError(
                f"the grid of `space` has {points} points: a sweep has at most {MAX_TRIALS} trials; "
                "list fewer values, or draw with algorithm: random"
            )
        for text in self.constraints:
            Constraint.parse(text)
        return self

    @model_validator(mode="after")
    def _budgets_fit(self) -> SearchConfig:
        if len(set(self.budgets)) < len(self.budgets):
            raise ValueError("`budgets` names one twice; keep one")
        if self.asha is not None and len(self.budgets) > 1:
            raise ValueError("`asha` compares trials of one budget: name one in `budgets`")
        if self.algorithm == "tpe" and (self.seeds > 1 or len(self.budgets) > 1):
            raise ValueError(
                "algorithm: tpe trains each point once: leave `seeds` and `budgets` out; `final` trains the best with several seeds"
            )
        if self.objectives and self.algorithm != "tpe":
            raise ValueError("`objectives` are for algorithm: tpe; trials are compared by `metric`")
        if self.metric in self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise ValueError("`objectives` are other metrics than `metric`, each once")
        if self.final is not None and len(self.budgets) > 1:
            raise ValueError("`final` compares trials of one budget: name one in `budgets`")
        if (self.seeds > 1 or self.final is not None) and any(
            key == "seed" for key in (*self.space, *itertools.chain(*self.first))
        ):
            raise ValueError("`seeds` or `final` and a `seed` that varies exclude each other: keep one")
        return self

    @model_validator(mode="after")
    def _final_fits(self) -> SearchConfig:
        if self.final is None:
            return self
        key = self.final.of_each
        if key is not None and key not in self.space and not any(key in point for point in self.first):
            raise ValueError(f"`final.of_each` names `{key}`, which does not vary: name a setting of `space`")
        dimension = None if key is None or key not in self.space else self.dimensions()[key]
        if dimension is not None and dimension.values is None:
            raise ValueError(
                f"`final.of_each` names `{key}`, which is a range: name one with a list of values"
            )
        if self.final.metrics and key not in ("objective", "objective.method"):
            raise ValueError("`final.metrics` rank the points of each method: they need `of_each: objective`")
        unknown = [method for method in self.final.metrics if method not in OBJECTIVES]
        if unknown:
            raise ValueError(
                f"`final.metrics` has no method {unknown[0]!r}; known are {', '.join(OBJECTIVES)}"
            )
        return self

    @model_validator(mode="after")
    def _population_fits(self) -> SearchConfig:
        if self.pbt is None:
            return self
        if self.asha is not None:
            raise ValueError("`asha` ends trials at rungs and `pbt` replaces them: keep one")
        if self.algorithm == "tpe":
            raise ValueError("`pbt` begins with its whole population: take algorithm: random, sobol or grid")
        if self.seeds > 1 or self.final is not None or self.budgets != ("steps",):
            raise ValueError(
                "`pbt` compares one population of one seed and equal steps: leave `seeds`, `final` and `budgets` out; the settings "
                "that a trial came to are trained again with other seeds by its command in the report"
            )
        dimensions = self.dimensions()
        if waiting := next((key for key, dimension in dimensions.items() if dimension.when), None):
            raise ValueError(f"`pbt` moves every setting of every trial: leave `when` of `{waiting}` out")
        grid = math.prod(len(dimension.grid) for dimension in dimensions.values() if dimension.grid)
        if not self.space or grid * (self.trials or 1) + len(self.first) < 2:
            raise ValueError("`pbt` needs a `space` and a population of 2 trials or more (`trials`)")
        return self

    @property
    def drawn(self) -> int:
        """Trials of which results decide the point."""
        return max(0, (self.trials or 0) - self.startup) if self.algorithm == "tpe" else 0

    @property
    def added(self) -> int:
        """At most so many trials come to those that the file lists while the sweep runs."""
        return self.drawn + (self._groups * self.final.best * self.final.seeds if self.final else 0)

    @property
    def _groups(self) -> int:
        """Values of `final.of_each`, each of which has a best point; 1 without it."""
        key = self.final.of_each if self.final else None
        if key is None:
            return 1
        values = self.dimensions()[key].values if key in self.space else None
        listed = [*(values or ()), *(point[key] for point in self.first if key in point)]
        return len({json.dumps(value, sort_keys=True, default=str) for value in listed})

    def dimensions(self) -> dict[str, Dimension]:
        """The space, with bare lists as what they are for the algorithm."""
        return {key: dimension_of(values, self.algorithm) for key, values in self.space.items()}
