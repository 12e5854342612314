"""Points that a tree-structured Parzen estimator (Optuna's TPE) proposes from the trials so far.

Nothing is kept between proposals: the record of the sweep is the algorithm's memory, so that a sweep that goes on proposes what it
would have proposed.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from soflow_platform.config.dimensions import Dimension
from soflow_platform.tuning.points import PointSettings, SearchSpace


class TriedState(Enum):
    """How far a trial is."""

    RUNNING = "running"
    FINISHED = "finished"
    PRUNED = "pruned"
    FAILED = "failed"


@dataclass(frozen=True)
class Tried:
    """A trial that the next proposal takes into account."""

    settings: Mapping[str, Any]
    state: TriedState
    values: tuple[float, ...] = ()
    """Its value of each objective, where it has been scored."""
    step: int = 0
    """Step of the last evaluation, where it was pruned."""


@dataclass(frozen=True)
class Proposer:
    """Proposes points of a space."""

    space: SearchSpace
    modes: tuple[str, ...]
    """`min` or `max` for each objective."""
    seed: int

    def propose(self, tried: Sequence[Tried], number: int, attempt: int = 0) -> dict[str, Any]:
        """The point of the trial `number`, which fulfils conditions and may break constraints; another for each `attempt`.

        A function of its arguments alone.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            # `multivariate` and `group` are marked experimental.
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.TPESampler(
                multivariate=True,
                group=True,
                constant_liar=True,
                n_startup_trials=self.space.search.startup,
                seed=zlib.crc32(f"{self.seed}-{number}-{attempt}".encode()),
            )
        study = optuna.create_study(directions=[f"{mode}imize" for mode in self.modes], sampler=sampler)
        study.add_trials([trial for each in tried if (trial := self._known(each)) is not None])
        trial = study.ask()
        point: dict[str, Any] = {}
        for key in self.space.order:
            if self.space.active(key, point):
                point[key] = _asked(trial, key, self.space.dimensions[key])
        return {key: point[key] for key in self.space.dimensions if key in point}

    def _known(self, tried: Tried) -> Any:
        """A trial as Optuna has it; None for one that is no point of the space, or has nothing to learn from."""
        from optuna.trial import TrialState, create_trial

        coordinates = self._coordinates(tried)
        if coordinates is None or tried.state is TriedState.FAILED:
            return None
        known = {
            "params": {key: value for key, (value, _) in coordinates.items()},
            "distributions": {key: distribution for key, (_, distribution) in coordinates.items()},
        }
        if tried.state is TriedState.RUNNING:
            return create_trial(state=TrialState.RUNNING, **known)
        if len(tried.values) != len(self.modes) or not all(map(math.isfinite, tried.values)):
            return None
        if tried.state is TriedState.PRUNED and len(self.modes) == 1:
            steps = {tried.step: tried.values[0]}
            return create_trial(state=TrialState.PRUNED, intermediate_values=steps, **known)
        return create_trial(state=TrialState.COMPLETE, values=list(tried.values), **known)

    def _coordinates(self, tried: Tried) -> dict[str, tuple[Any, Any]] | None:
        """Of each setting that varies in a trial, Optuna's value and distribution; None where one is outside its dimension."""
        value_of = PointSettings(self.space.file, tried.settings)
        found = {}
        for key in self.space.order:
            dimension = self.space.dimensions[key]
            if not value_of.fulfil(dimension.when):
                continue
            try:
                value = value_of(key)
            except KeyError:
                return None
            quantile = dimension.quantile(value)
            if quantile is None:
                return None
            if dimension.values is not None:
                value = dimension.values.index(value)
            elif dimension.normal is not None:
                value = quantile
            found[key] = value, _distribution(dimension)
        return found


def _distribution(dimension: Dimension) -> Any:
    """Optuna's distribution; values of a list are their places, and a normal distribution is uniform in its quantile."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.values is not None:
        return CategoricalDistribution(range(len(dimension.values)))
    if dimension.integer is not None:
        return IntDistribution(*dimension.integer)
    if dimension.normal is not None:
        return FloatDistribution(0.0, 1.0)
    low, high = dimension.log_uniform or dimension.uniform or (0.0, 1.0)
    return FloatDistribution(low, high, log=dimension.log_uniform is not None)


def _asked(trial: Any, key: str, dimension: Dimension) -> Any:
    """The value that Optuna proposes for a setting."""
    if dimension.values is not None:
        return dimension.values[trial.suggest_categorical(key, range(len(dimension.values)))]
    if dimension.integer is not None:
        return trial.suggest_int(key, *dimension.integer)
    if dimension.normal is not None:
        return dimension.at(trial.suggest_float(key, 0.0, 1.0))
    low, high = dimension.log_uniform or dimension.uniform or (0.0, 1.0)
    return trial.suggest_float(key, low, high, log=dimension.log_uniform is not None)
