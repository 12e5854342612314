"""Charts of the report of a sweep, as Plotly figures without colours of the page, which follow the reader's light or dark setting."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from soflow_platform.jobs.report_data import ReportedTrial, SweepReport
from soflow_platform.jobs.report_importance import is_logarithmic, is_number

T = TypeVar("T")

SCALE = ((31, 119, 200), (128, 100, 190), (200, 85, 135), (222, 120, 60))
"""Colours from the best trial to the worst, of middle brightness, to be read on white and on black."""
LEGEND = 8
"""Trials that are named in a legend; more are named where the pointer is."""
SPREAD = 15.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
NAME = 40
"""Characters of a name in a legend."""


def colour(place: int, count: int) -> str:
    """Of the trial at a place in the ranking."""
    at = place / max(1, count - 1) * (len(SCALE) - 1)
    low = min(int(at), len(SCALE) - 2)
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(SCALE[low], SCALE[low + 1], strict=True))
    return f"rgb({', '.join(map(str, mixed))})"


def shown(value: Any) -> str:
    """A value of a setting as a text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def short_key(key: str) -> str:
    """A setting's path without the section that most of them are in."""
    return key.removeprefix("objective.")


def curves(report: SweepReport, against: str) -> Any:
    """The metric of every trial over images, or over device-seconds of training (`against` is `images` or `seconds`)."""
    lines = []
    for trial in report.scored:
        batch = trial.trial.experiment.training.batch
        points = [
            (e["step"] * batch if against == "images" else trial.seconds_at(e["step"]), e[report.metric])
            for e in trial.evaluations
            if is_number(e.get(report.metric))
        ]
        lines.append((trial, [(x, y) for x, y in points if x is not None]))
    title = "images seen" if against == "images" else f"{report.devices}-seconds of training"
    figure = _lines(lines, title, report.metric, report.winner)
    _logarithmic_where_wide(figure, lines)
    return figure


def schedules(report: SweepReport) -> Any | None:
    """The schedule of every trial whose method has one, over the share of the training that is done; None where none has."""
    curves_ = [(trial, found) for trial in report.scored or report.trials if (found := trial.schedule())]
    if not curves_:
        return None
    lines = []
    for trial, (_, points) in curves_:
        total = points[-1][0]
        lines.append((trial, [(step / total, value) for step, value in points]))
    names = " and ".join(dict.fromkeys(name for _, (name, _) in curves_))
    figure = _lines(lines, "k / K", names, report.winner, markers=False)
    _logarithmic_where_wide(figure, lines)
    return figure


def _logarithmic_where_wide(
    figure: Any, lines: Sequence[tuple[ReportedTrial, list[tuple[float, float]]]]
) -> None:
    """Make the upright axis logarithmic, with a label at each 1, 2 and 5, where positive values span much."""
    values = [y for _, points in lines for _, y in points]
    if not values or min(values) <= 0 or max(values) / min(values) <= SPREAD:
        return
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    parts = (1, 2, 5) if last - first <= 3 else (1,)
    ticks = [part * 10.0**power for power in range(first, last + 1) for part in parts]
    texts = [f"{tick:g}" for tick in ticks]
    figure.update_yaxes(type="log", tickmode="array", tickvals=ticks, ticktext=texts)


def _lines(
    lines: Sequence[tuple[ReportedTrial, list[tuple[float, float]]]],
    x: str,
    y: str,
    winner: str | None,
    markers: bool = True,
) -> Any:
    from plotly import graph_objects

    figure = graph_objects.Figure()
    count = len(lines)
    for place, (trial, points) in _winner_last(lines, winner):
        first = trial.name == winner
        figure.add_scatter(
            x=[point[0] for point in points],
            y=[point[1] for point in points],
            mode="lines+markers" if markers else "lines",
            name=html.escape(short(trial.name)),
            line={"color": colour(place, count), "width": 4 if first else 1.5},
            marker={"size": 8 if first else 5},
            opacity=1 if first else 0.75,
            hovertemplate=f"{html.escape(trial.name)}<br>%{{x:.5~g}}: %{{y:.5~g}}<extra></extra>",
            showlegend=count <= LEGEND,
        )
    figure.update_layout(
        layout(),
        xaxis={"title": {"text": x}, "rangemode": "tozero"},
        yaxis={"title": {"text": y, "standoff": 14}},
        legend={"orientation": "h", "y": -0.28, "yanchor": "top", "traceorder": "reversed"},
    )
    return figure


def _winner_last(
    lines: Sequence[tuple[ReportedTrial, T]], winner: str | None
) -> list[tuple[int, tuple[ReportedTrial, T]]]:
    """The lines with their places, from the worst to the best and then the winner, which so lies on top."""
    placed = list(reversed(list(enumerate(lines))))
    return sorted(placed, key=lambda each: each[1][0].name == winner)


def parallel_coordinates(report: SweepReport) -> Any | None:
    """One line for each scored trial over an axis for each setting that varies, and the metric; None where none varies."""
    from plotly import graph_objects

    by_name = {trial.name: place for place, trial in enumerate(report.trials)}
    ranked = report.scored
    columns = {
        key: [values[by_name[trial.name]] for trial in ranked] for key, values in report.varied().items()
    }
    # A setting that trials without a score alone have is no axis.
    columns = {key: values for key, values in columns.items() if any(each is not None for each in values)}
    if not columns or len(ranked) < 2:
        return None
    columns[report.metric] = [trial.best.metrics[report.metric] for trial in ranked if trial.best]
    axes = [_Axis(key, values) for key, values in columns.items()]
    figure = graph_objects.Figure()
    for place, (trial, _) in _winner_last([(trial, None) for trial in ranked], report.winner):
        first = trial.name == report.winner
        heights = [axis.height(axis.values[place]) for axis in axes]
        said = "<br>".join(
            f"{html.escape(axis.key)}: {html.escape(shown(axis.values[place]))}" for axis in axes
        )
        figure.add_scatter(
            x=list(range(len(axes))),
            y=heights,
            mode="lines+markers",
            line={
                "color": colour(place, len(ranked)),
                "width": 4 if first else 1.5,
                "shape": "spline",
                "smoothing": 0.4,
            },
            marker={"size": 8 if first else 5},
            opacity=1 if first else 0.7,
            hovertemplate=f"<b>{html.escape(trial.name)}</b><br>{said}<extra></extra>",
            showlegend=False,
            connectgaps=False,
        )
    for number, axis in enumerate(axes):
        figure.add_shape(type="line", x0=number, x1=number, y0=0, y1=1, layer="below", line={"width": 1})
        for height, text in axis.ticks():
            figure.add_annotation(
                x=number,
                y=height,
                text=html.escape(text),
                showarrow=False,
                xanchor="left",
                xshift=8,
                font={"size": 11},
            )
    names = [html.escape(short_key(axis.key)) for axis in axes]
    figure.update_layout(
        layout(),
        xaxis={
            "tickmode": "array",
            "tickvals": list(range(len(axes))),
            "ticktext": names,
            "side": "top",
            "range": [-0.05, len(axes) - 1 + 0.16 * len(axes)],
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"visible": False, "range": [-0.06, 1.06]},
        margin={"l": 52, "r": 16, "t": 44, "b": 12},
    )
    return figure


class _Axis:
    """One axis of the parallel coordinates: numbers by size, other values side by side."""

    def __init__(self, key: str, values: Sequence[Any]) -> None:
        self.key, self.values = key, values
        present = [value for value in values if value is not None]
        self.numeric = all(is_number(value) for value in present)
        self.logarithmic = self.numeric and is_logarithmic(present)
        self.texts = [] if self.numeric else list(dict.fromkeys(map(str, present)))
        scaled = [self._scaled(value) for value in present] if self.numeric else [0.0]
        self.low, self.high = min(scaled), max(scaled)

    def height(self, value: Any) -> float | None:
        """Between 0 and 1; None for a trial that does not have the setting."""
        if value is None:
            return None
        if not self.numeric:
            return self.texts.index(str(value)) / max(1, len(self.texts) - 1)
        return (self._scaled(value) - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Heights and texts of its labels."""
        if not self.numeric:
            return [(self.height(text) or 0.0, text[:28]) for text in self.texts]
        numbers = sorted({value for value in self.values if value is not None})
        if len(numbers) > 5:
            places = [self.low + (self.high - self.low) * part / 4 for part in range(5)]
            numbers = [math.exp(place) if self.logarithmic else place for place in places]
        return [(self.height(number) or 0.0, f"{number:.3g}") for number in numbers]

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.logarithmic else float(value)


def importance_bars(shares: dict[str, float]) -> Any:
    """A bar for each setting, the most important on top."""
    from plotly import graph_objects

    rows = list(reversed(shares.items()))
    figure = graph_objects.Figure()
    figure.add_bar(
        x=[share for _, share in rows],
        y=[html.escape(short_key(key)) for key, _ in rows],
        orientation="h",
        marker={"color": f"rgb{SCALE[0]}"},
        text=[f"{share:.0%}" for _, share in rows],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        width=0.6,
    )
    figure.update_layout(
        layout(),
        height=90 + 34 * len(rows),
        xaxis={
            "range": [0, max(1e-9, max(shares.values())) * 1.15],
            "tickformat": ".0%",
            "title": {"text": "share of the variance"},
        },
        yaxis={"automargin": True, "ticksuffix": "  "},
        margin={"l": 8, "r": 30, "t": 8, "b": 48},
    )
    return figure


def layout() -> dict[str, Any]:
    """What all charts of the page have in common."""
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "autosize": True,
        "height": 420,
        "margin": {"l": 64, "r": 16, "t": 12, "b": 56},
        "hoverlabel": {"align": "left"},
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
    }


def short(name: str) -> str:
    """A name that fits a legend."""
    return name if len(name) <= NAME else f"{name[: NAME - 3]}..."
