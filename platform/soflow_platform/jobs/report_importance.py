"""Importance of the settings of a sweep: the share of the metric's variance that each explains, by Optuna's fANOVA."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

FEWEST = 4
"""Scored points below which nothing can be said."""
LOGARITHMIC = 20.0
"""Ratio of the largest to the smallest of positive values from which they are compared by their logarithms."""


def importance(columns: Mapping[str, Sequence[Any]], values: Sequence[float]) -> dict[str, float] | str:
    """The share of each setting, largest first, or the reason why there is none.

    `columns`: each setting's value in every trial. `values`: the trials' metric; those that are not finite are left out.
    """
    kept = [place for place, value in enumerate(values) if math.isfinite(value)]
    chosen = {key: [column[place] for place in kept] for key, column in columns.items()}
    # A setting that some trials do not have cannot be told from the condition on which they have it.
    chosen = {
        key: column
        for key, column in chosen.items()
        if None not in column and len({json.dumps(each, default=str) for each in column}) > 1
    }
    if len(kept) < FEWEST:
        return f"{len(kept)} scored trials are too few to tell which setting decides: {FEWEST} at least."
    if not chosen:
        return "no setting that every trial has takes several values."
    if len({values[place] for place in kept}) == 1:
        return "all trials have the same value."
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    distributions = {key: _distribution(column) for key, column in chosen.items()}
    for row, place in enumerate(kept):
        params = {key: _param(column[row], distributions[key]) for key, column in chosen.items()}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=values[place])
        )
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def is_logarithmic(values: Sequence[Any]) -> bool:
    """Whether numbers span so much that they are compared by their logarithms."""
    numbers = [value for value in values if is_number(value)]
    return bool(numbers) and min(numbers) > 0 and max(numbers) / min(numbers) >= LOGARITHMIC


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _distribution(column: Sequence[Any]) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if all(is_number(value) for value in column):
        return FloatDistribution(float(min(column)), float(max(column)), log=is_logarithmic(column))
    return CategoricalDistribution(sorted({json.dumps(value, default=str) for value in column}))


def _param(value: Any, distribution: Any) -> Any:
    return float(value) if hasattr(distribution, "low") else json.dumps(value, default=str)
