"""Pareto fronts of a sweep with several objectives: the trials that no other one beats in both of two values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from soflow_platform.config.search import TRAINING_SECONDS
from soflow_platform.jobs.report_charts import LEGEND, layout, short
from soflow_platform.jobs.report_data import ReportedTrial, SweepReport


def pareto_front(values: Sequence[tuple[float, float]], modes: tuple[str, str]) -> list[int]:
    """Places of the values of which no other is at least as good in both and better in one, in the order of the first value.

    `modes` are `min` or `max`. Values that are not finite are on no front.
    """
    signs = [1 if mode == "min" else -1 for mode in modes]
    known = [
        (signs[0] * first, signs[1] * second, place)
        for place, (first, second) in enumerate(values)
        if math.isfinite(first) and math.isfinite(second)
    ]
    front: list[int] = []
    best, at = math.inf, -math.inf
    for first, second, place in sorted(known):
        if second < best or (second == best and first == at):
            front.append(place)
            best, at = second, first
    return front


def objective_value(trial: ReportedTrial, name: str) -> float:
    """A trial's value of an objective at its best evaluation; NaN where it has none."""
    if trial.best is None or trial.failure:
        return math.nan
    value = trial.cost if name == TRAINING_SECONDS else trial.best.metrics.get(name)
    return math.nan if value is None else float(value)


def front_of(report: SweepReport, other: str) -> list[ReportedTrial]:
    """The trials on the front of the metric and another objective, the best value of the metric first."""
    modes = report.experiment.objective_modes
    trials = report.scored
    values = [(report.value(trial), objective_value(trial, other)) for trial in trials]
    return [trials[place] for place in pareto_front(values, (modes[report.metric], modes[other]))]


def pareto_chart(report: SweepReport, other: str) -> Any:
    """Every trial by the metric and another objective, with the front as a line."""
    from plotly import graph_objects

    front = front_of(report, other)
    figure = graph_objects.Figure(layout=layout())
    for title, trials, mode in (
        ("other trials", [trial for trial in report.scored if trial not in front], "markers"),
        ("front", front, "lines+markers" if len(front) <= LEGEND else "lines"),
    ):
        figure.add_scatter(
            x=[objective_value(trial, other) for trial in trials],
            y=[report.value(trial) for trial in trials],
            mode=mode,
            name=title,
            text=[short(trial.name) for trial in trials],
            hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
        )
    unit = f"{report.devices}-seconds of training" if other == TRAINING_SECONDS else other
    figure.update_layout(xaxis_title=unit, yaxis_title=report.metric)
    return figure
