"""Expands a search space into trials, each a complete experiment that is checked before anything starts."""

from __future__ import annotations

import copy
import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from soflow_core.nfe import sampling_evaluations, steps_for, training_evaluations
from soflow_platform.config.document import MAX_DEPTH, Document, KeyPath, Origin, shortened
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.search import Budget, Range, SearchConfig
from soflow_platform.config.validation import validate
from soflow_platform.errors import UserError
from soflow_platform.generation.sampling import with_sampling

FIXED = ("search", "resources", "tracking", "registry", "name", "data")
"""Sections that all trials of a sweep have in common."""
SPACE: KeyPath = ("search", "space")


@dataclass(frozen=True)
class Trial:
    """One point of the search. `name` is unique in the sweep and says what varies."""

    index: int
    name: str
    settings: dict[str, Any]
    experiment: Experiment
    budgets: tuple[Budget, ...]
    """Budgets that this trial was made for; several where they come to the same steps."""


@dataclass(frozen=True)
class Point:
    """Settings that one trial has in the place of those of the file."""

    settings: dict[str, Any]
    written: KeyPath
    """Where the settings were written: the path of their section in the document."""
    name: str | None = None


def trials(document: Document, experiment: Experiment) -> list[Trial]:
    """Every trial of a sweep, in order; the same document always gives the same list.

    Points of `search.first` come first; one of the space that stands for the same experiment is left out. A point that two budgets give
    the same steps is one trial, of both. Raises UserError where a point is not a valid experiment.
    """
    search = experiment.search
    usual, *others = search.budgets
    points: list[Point] = []
    found: list[Trial] = []
    listed: list[Experiment] = []
    for point in itertools.chain(_first_points(search), _space_points(search, experiment.seed)):
        trial = _trial(document, experiment, len(found), point, usual)
        if trial.experiment in listed:
            continue
        if point.written != SPACE:
            listed.append(trial.experiment)
        points.append(point)
        found.append(trial)
    for number, budget in enumerate(others, start=1):
        for place, point in enumerate(points):
            trial = _trial(document, experiment, number * len(points) + place, point, budget)
            if found[place].experiment != trial.experiment:
                found.append(trial)
                continue
            both = (*found[place].budgets, budget)
            settings = {**found[place].settings, "budget": ", ".join(both)}
            found[place] = replace(found[place], settings=settings, budgets=both)
    return found


def _first_points(search: SearchConfig) -> list[Point]:
    """The points of `search.first`."""
    points = []
    for place, settings in enumerate(search.first):
        varied = {key: value for key, value in settings.items() if key != "name"}
        name = settings.get("name", None if varied else "as-written")
        points.append(Point(varied, ("search", "first", place), name))
    return points


def _space_points(search: SearchConfig, seed: int) -> Iterator[Point]:
    """The points of `search.space`; where that is empty, the file as it is written, unless `search.first` lists the points."""
    if search.first and not search.space:
        return
    for settings in _points(search, seed):
        yield Point(settings, SPACE)


def _points(search: SearchConfig, seed: int) -> list[dict[str, Any]]:
    keys = list(search.space)
    if search.algorithm == "grid":
        lists = [values for values in search.space.values() if isinstance(values, list)]
        return [dict(zip(keys, combination, strict=True)) for combination in itertools.product(*lists)]
    generator = random.Random(f"search-{seed}")
    return [
        {key: _draw(values, generator) for key, values in search.space.items()}
        for _ in range(search.trials or 0)
    ]


def _draw(values: list[Any] | Range, generator: random.Random) -> Any:
    if isinstance(values, list):
        return generator.choice(values)
    if values.uniform is not None:
        return generator.uniform(*values.uniform)
    low, high = values.log_uniform or (1.0, 1.0)
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def _trial(document: Document, base: Experiment, index: int, point: Point, budget: Budget) -> Trial:
    trial_document = Document(copy.deepcopy(document.data), dict(document.origins))
    section = ".".join(part for part in point.written if isinstance(part, str))
    settings = dict(point.settings)
    for key, value in settings.items():
        where = document.origin((*point.written, key))
        if key.split(".")[0] in FIXED:
            raise UserError(
                f"{where}: `{shortened(key)}` cannot vary between trials; vary settings of objective, network, optimizer or training."
            )
        path = tuple(key.split("."))
        if len(path) > MAX_DEPTH:
            raise UserError(f"{where}: `{shortened(key)}` is no setting.")
        trial_document.put(path, value, Origin(f"{where.source} ({section} {shortened(key)})", where.line))
    experiment = validate(trial_document)
    if budget == "evaluations":
        where = document.origin(("search", "budgets"))
        origin = Origin(f"{where.source} (search.budgets {budget})", where.line)
        trial_document.put(("training", "steps"), equal_evaluations(base, experiment), origin)
        experiment = validate(trial_document)
    _check_sampling(trial_document, experiment)
    parts = [point.name] if point.name else [_setting_name(key, value) for key, value in settings.items()]
    if len(base.search.budgets) > 1:
        parts.append(f"equal-{budget}")
        settings["budget"] = budget
    name = re.sub(r"[^\w.=+-]+", "_", "-".join([f"trial-{index:02d}", *parts]))[:120]
    return Trial(index, name, settings, experiment, (budget,))


def _check_sampling(document: Document, experiment: Experiment) -> None:
    """Raises UserError where the trained network could not be sampled as evaluation and comparison ask."""
    objective, conditional = experiment.objective, experiment.data.conditional
    try:
        for nfe in experiment.evaluation.nfe:
            steps_for(objective, nfe, conditional)
    except ValueError as error:
        raise UserError(f"{document.origin(('evaluation', 'nfe'))}: `evaluation.nfe`: {error}.") from None
    try:
        for row in experiment.comparison:
            if row.covers(objective.method):
                sampled = with_sampling(objective, row.settings)
                for steps in row.steps:
                    sampling_evaluations(sampled, steps, conditional)
    except (UserError, ValueError) as error:
        message = str(error).rstrip(".")
        raise UserError(f"{document.origin(('comparison',))}: `comparison`: {message}.") from None


def equal_evaluations(base: Experiment, experiment: Experiment) -> int:
    """Steps in which `experiment` evaluates its network as often as `base` does in its own."""
    spent = base.training.steps * _evaluations_of_a_step(base)
    return max(1, round(spent / _evaluations_of_a_step(experiment)))


def _evaluations_of_a_step(experiment: Experiment) -> float:
    batch = experiment.training.batch
    return batch * training_evaluations(experiment.objective, batch, experiment.data.conditional)


def _setting_name(key: str, value: Any) -> str:
    """Part of a trial's name for one setting: `weight_power=1`; for a section its method or kind, or the settings in it."""
    if isinstance(value, dict):
        name = value.get("method") or (value.get("kind") if key == "network" else None)
        return str(name or "-".join(_setting_name(k, v) for k, v in value.items()))
    return f"{key.rsplit('.', 1)[-1]}={f'{value:.4g}' if isinstance(value, float) else value}"
