"""soflowctl validate: check a sweep file, and name the settings in which its trials depart from the paper's recipe."""

from __future__ import annotations

import sys
from typing import Any

from soflow_platform.cli.sweep_file import (
    CheckedSweep,
    compared_by,
    later_trials,
    print_proxy,
    read,
    steps_of,
)
from soflow_platform.config.recipe import departures, recipe_of


def validate_command(name: str, overrides: tuple[str, ...], proxy: str | None = None) -> None:
    """Print that a file is sound and what it stands for, and on stderr where it leaves the paper's recipe."""
    sweep = read(name, overrides, proxy)
    experiment, planned = sweep.experiment, sweep.trials
    methods = ", ".join(dict.fromkeys(trial.experiment.objective.method for trial in planned))
    print(
        f"{sweep.path} is valid: {len(planned)} trial(s){later_trials(experiment)} of {methods}, {steps_of(planned)} steps "
        f"of {experiment.training.batch} samples, {compared_by(experiment)}."
    )
    print_proxy(sweep, proxy)
    for line in recipe_warnings(sweep):
        print(line, file=sys.stderr)


def recipe_warnings(sweep: CheckedSweep) -> list[str]:
    """A line for every setting in which trials depart from the paper's recipe, below a line that counts them."""
    values: dict[tuple[str, str], list[Any]] = {}
    published: dict[tuple[str, str], Any] = {}
    departing = 0
    for trial in sweep.trials:
        recipe = recipe_of(trial.experiment)
        if recipe is None:
            continue
        found = departures(trial.experiment, recipe)
        departing += bool(found)
        for key, value in found.items():
            values.setdefault((key, recipe.name), []).append(value)
            published[key, recipe.name] = recipe.settings[key]
    if not values:
        return []
    lines = [f"warning: {departing} of {len(sweep.trials)} trials depart from the paper's recipe:"]
    for (key, recipe_name), given in values.items():
        which = "" if len(given) == len(sweep.trials) else f" in {len(given)} of them"
        lines.append(
            f"  `{key}` is {_shown(given)}{which} ({_where(sweep, key)}), and {_value(published[key, recipe_name])} in {recipe_name}"
        )
    return lines


def _where(sweep: CheckedSweep, key: str) -> str:
    """Where a setting was written, or its values in the search."""
    search = sweep.experiment.search
    for place, varied in (
        ("space", search.space),
        ("first", {key for point in search.first for key in point}),
    ):
        if any(key == each or key.startswith(f"{each}.") for each in varied):
            return f"search.{place}"
    path = tuple(key.split("."))
    written = path in sweep.document.origins
    return str(sweep.document.origin(path)) if written else "not set: the default"


def _shown(values: list[Any]) -> str:
    """The value, the values, or the range of numbers."""
    distinct = list(dict.fromkeys(map(_value, values)))
    if len(distinct) == 1:
        return distinct[0]
    if all(isinstance(value, int | float) for value in values):
        return f"{_value(min(values))} to {_value(max(values))}"
    return " or ".join(distinct)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
