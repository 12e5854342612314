"""Expands a search space into trials, each a complete experiment that is checked before anything starts."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from soflow_core.nfe import sampling_evaluations, steps_for, training_evaluations
from soflow_platform.config.document import MAX_DEPTH, Document, KeyPath, Origin, shortened
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.sampling_settings import with_sampling
from soflow_platform.config.search import Budget, SearchConfig
from soflow_platform.config.validation import validate
from soflow_platform.errors import UserError
from soflow_platform.tuning.points import SearchSpace
from soflow_platform.tuning.trial_names import trial_label

FIXED = ("search", "resources", "tracking", "registry", "name", "data", "sampling")
"""Sections that all trials of a sweep have in common."""
SPACE: KeyPath = ("search", "space")
Phase = Literal["listed", "drawn", "final"]
"""How a trial came into its sweep: by the file alone, by a search algorithm from the results so far, or as one of the best again."""


@dataclass(frozen=True)
class Trial:
    """One point of the search. `name` is unique in the sweep and says what varies."""

    index: int
    name: str
    settings: dict[str, Any]
    experiment: Experiment
    budgets: tuple[Budget, ...]
    """Budgets that this trial was made for; several where they come to the same steps."""
    phase: Phase = "listed"


@dataclass(frozen=True)
class Point:
    """Settings that one trial has in the place of those of the file."""

    settings: dict[str, Any]
    written: KeyPath
    """Where the settings were written: the path of their section in the document."""
    name: str | None = None
    phase: Phase = "listed"


def trials(document: Document, experiment: Experiment) -> list[Trial]:
    """Every trial of a sweep that its file alone decides, in order; the same document always gives the same list.

    Points of `search.first` come first; one of the space that stands for the same experiment is left out. A point that two budgets give
    the same steps is one trial, of both. Raises UserError where a point is not a valid experiment.
    """
    search = experiment.search
    if search.pbt is not None and experiment.training.changes:
        where = document.origin(("training", "changes"))
        raise UserError(
            f"{where}: search.pbt decides what changes in mid-run: leave training.changes out, or search.pbt."
        )
    usual, *others = search.budgets
    points: list[Point] = []
    found: list[Trial] = []
    listed: list[Experiment] = []
    for point in _with_seeds([*_first_points(search), *_space_points(experiment)], experiment):
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


def _space_points(experiment: Experiment) -> Iterator[Point]:
    """The points of `search.space`; where that is empty, the file as it is written, unless `search.first` lists the points."""
    search = experiment.search
    if search.first and not search.space:
        return
    for settings in SearchSpace(search, experiment.resolved()).points(experiment.seed):
        yield Point(settings, SPACE)


def _with_seeds(points: Iterable[Point], experiment: Experiment) -> Iterator[Point]:
    """Every point once for each of `search.seeds`."""
    count = experiment.search.seeds
    for point in points:
        for seed in range(experiment.seed, experiment.seed + count):
            settings = {**point.settings, "seed": seed} if count > 1 else point.settings
            name = f"{point.name}-seed={seed}" if point.name and count > 1 else point.name
            yield replace(point, settings=settings, name=name)


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
    parts = list(filter(None, [point.name or trial_label(settings, base.search)]))
    if len(base.search.budgets) > 1:
        parts.append(f"equal-{budget}")
        settings["budget"] = budget
    name = re.sub(r"[^\w.=+-]+", "_", "-".join([f"trial-{index:02d}", *parts]))[:120]
    return Trial(index, name, settings, experiment, (budget,), point.phase)


def added_trial(
    document: Document, experiment: Experiment, index: int, settings: dict[str, Any], phase: Phase
) -> Trial:
    """A trial that results have led to, the `index`-th of its sweep. Raises UserError where its settings are no valid experiment."""
    (budget,) = experiment.search.budgets
    name = None
    if phase == "final":
        name = "-".join(filter(None, ["final", trial_label(settings, experiment.search)]))
    return _trial(document, experiment, index, Point(settings, SPACE, name, phase), budget)


def recorded_trial(
    document: Document, experiment: Experiment, index: int, name: str, settings: dict[str, Any], phase: Phase
) -> Trial:
    """A trial as it was recorded: `settings` in the place of the file's, its budgets among them where a sweep has several.

    Raises UserError where they are no valid experiment.
    """
    known = experiment.search.budgets
    of = str(settings.get("budget", "")).split(", ")
    budgets = tuple(budget for budget in known if budget in of) or known
    varied = {key: value for key, value in settings.items() if key != "budget"}
    trial = _trial(document, experiment, index, Point(varied, SPACE, None, phase), budgets[0])
    return replace(trial, name=name, settings=settings, budgets=budgets)


def _check_sampling(document: Document, experiment: Experiment) -> None:
    """Raises UserError where the trained network could not be sampled as evaluation and comparison ask."""
    conditional = experiment.data.conditional
    try:
        objective = experiment.sampled_objective
    except UserError as error:
        raise UserError(f"{document.origin(('sampling',))}: `sampling`: {error}") from None
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
