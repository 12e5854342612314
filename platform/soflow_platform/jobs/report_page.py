"""The report of a sweep as one HTML page that needs no network: tables and charts, in light and dark, wide and narrow."""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soflow_platform.config.experiment import flatten
from soflow_platform.jobs import report_charts as charts
from soflow_platform.jobs.report_data import ReportedTrial, SweepReport
from soflow_platform.jobs.report_importance import importance
from soflow_platform.jobs.report_pareto import front_of, pareto_chart
from soflow_platform.jobs.report_population import population_parts
from soflow_platform.tuning.ranking import Gap
from soflow_platform.tuning.seed_statistics import FEWEST_PAIRED, SIGNIFICANCE

TO_THE_BEST = (
    " Where points have the same seeds, the difference to the best is the mean of that at equal seeds, ± its standard deviation;"
    f" decided is what a t-test calls one (of these differences from {FEWEST_PAIRED} seeds on, else Welch's), at {SIGNIFICANCE:.0%} for"
    " all pairs of points together (Holm)."
)
"""What the column of differences to the best point is."""
GRIDS = 4
"""Sample grids that are shown of a trial."""
STYLE = Path(__file__).with_suffix(".css")
SCRIPT = Path(__file__).with_suffix(".js")
"""Draws the figures in the colours of the page, and again where the reader turns from light to dark."""


class _Page:
    """Collects the parts of the page and its figures."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.figures: dict[str, Any] = {}

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)

    def section(self, title: str, text: str) -> None:
        self.add(f"<h2>{_text(title)}</h2>", f'<p class="soft">{_text(text)}</p>')

    def chart(self, figure: Any, name: str, width: int | None = None) -> None:
        """A figure; one with a width is scrolled where the page is narrower."""
        self.figures[name] = json.loads(figure.to_json())
        style = f' style="min-width: {width}px"' if width else ""
        self.add(f'<div class="scroll"><div id="{name}" role="img" aria-label="{name}"{style}></div></div>')


def page(report: SweepReport, base_text: str) -> str:
    """The whole page; `base_text` is the file that the commands of the trials start from."""
    made = _Page()
    _head(made, report)
    _ranking(made, report)
    _population(made, report)
    if report.scored:
        _curves(made, report)
        _fronts(made, report)
        _settings(made, report)
    schedules = charts.schedules(report)
    if schedules is not None:
        made.section("Schedules", "Each trial's schedule over its training, in the colour of its rank.")
        made.chart(schedules, "schedules")
    _grids(made, report)
    _trials(made, report, base_text)
    _environment(made, report)
    from plotly.offline import get_plotlyjs

    figures = json.dumps(made.figures, allow_nan=False).replace("</", "<\\/")
    title = _text(report.record.id)
    policy = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head><body><main>",
            *made.parts,
            "</main>",
            f'<script type="application/json" id="figures">{figures}</script>',
            f"<script>{get_plotlyjs()}</script>",
            f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>",
            "</body></html>",
        ]
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _seconds(report: SweepReport, seconds: float | None) -> str:
    """`93 CPU-s`, `2.1 GPU-hours`."""
    if seconds is None:
        return "-"
    return (
        f"{seconds / 3600:.3g} {report.devices}-hours"
        if seconds >= 3600
        else f"{seconds:.3g} {report.devices}-s"
    )


def _head(made: _Page, report: SweepReport) -> None:
    record = report.record
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created))
    made.add(
        f"<h1>{_text(record.id)}</h1>",
        f'<p class="soft">{_text(report.experiment.description or record.name)}</p>',
    )
    ended = sum(trial.state == "finished" for trial in report.trials)
    tiles = [
        (f"{ended} of {len(report.trials)}", "trials finished"),
        (report.state, f"begun {started}, started {record.attempts} time(s)"),
        (_seconds(report, report.cost), "of training steps"),
    ]
    if report.ranked and report.ranked[0].mean is not None:
        best = report.ranked[0]
        spread = f" ± {best.std:.2g}" if best.std is not None else ""
        said = f"{record.metric}, {'lower' if record.mode == 'min' else 'higher'} is better"
        tiles.insert(0, (f"{_number(best.mean)}{spread}", f"best {said}"))
        tiles.append((_number_of(best.trials[0].name), "best trial of the best point"))
    cells = [
        f'<div class="tile"><b{" class=long" if len(str(value)) > 18 else ""}>{_text(value)}</b><span>{_text(name)}</span></div>'
        for value, name in tiles
    ]
    made.add('<div class="tiles">', *cells, "</div>")
    made.add(*(f'<p class="note">{_text(note)}</p>' for note in report.notes))


def _ranking(made: _Page, report: SweepReport) -> None:
    several = any(len(point.trials) > 1 for point in report.ranked)
    by = "the mean over the seeds of a point" if several else "the best evaluation of each trial"
    rung, _ = report.experiment.rung_metric
    if rung != report.metric:
        by += f"; at rungs trials were compared by {rung}"
    made.section(
        "Ranking",
        f"By {report.metric}: {by}. A point is what its trials have in common.{TO_THE_BEST if several else ''}",
    )
    columns = report.varied()
    place_of = {trial.name: place for place, trial in enumerate(report.trials)}
    titles = ["", "trial", *map(charts.short_key, columns), report.metric]
    titles += ["std", "seeds", "to the best"] if several else []
    titles += ["at step", "cost", "state"]
    numeric = {report.metric, "std", "seeds", "to the best", "at step", "cost"}
    gaps = report.gaps() if several else []
    head = "".join(f"<th{_right(title in numeric)}>{_text(title)}</th>" for title in titles)
    rows, group = [], ""
    for place, point in enumerate(report.ranked, start=1):
        first, own = report.of(point.trials[0].name), [report.of(each.name) for each in point.trials]
        title = "The best points again, with fresh seeds" if first.trial.phase == "final" else "Search"
        if title != group and any(trial.trial.phase == "final" for trial in report.trials):
            group = title
            rows.append(f'<tr class="group"><td colspan="{len(titles)}">{_text(title)}</td></tr>')
        cells = [str(place), ", ".join(_number_of(trial.name) for trial in own)]
        cells += [charts.shown(values[place_of[first.name]]) for values in columns.values()]
        cells.append(_number(point.mean))
        cells += [_number(point.std), f"{len(point.values)} of {len(point.trials)}"] if several else []
        cells += [_gap(gaps[place - 1])] if several else []
        cells.append(f"{first.best.step:,}" if first.best else "-")
        cells.append(_seconds(report, _sum([trial.cost for trial in own])))
        cells.append(", ".join(dict.fromkeys(trial.state for trial in own)))
        row = "".join(
            f"<td{_right(title in numeric)}>{_text(cell)}</td>"
            for title, cell in zip(titles, cells, strict=True)
        )
        rows.append(f"<tr{' class=best' if place == 1 and point.values else ''}>{row}</tr>")
    made.add(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>', *rows, "</tbody></table></div>"
    )


def _population(made: _Page, report: SweepReport) -> None:
    parts = list(population_parts(report.record))
    if parts:
        metric, _ = report.experiment.rung_metric
        made.section(
            "Population",
            f"At each rung the worst trials by {metric} went on from the checkpoints of better ones, with other settings. Ranking and "
            "charts have the settings with which the trials themselves began; schedules are as they were trained.",
        )
        made.add(*parts)


def _gap(gap: Gap | None) -> str:
    """`+5.4 ± 3.1, decided`."""
    if gap is None:
        return "-"
    spread = f" ± {gap.std:.2g}" if gap.std is not None else ""
    return f"{gap.mean:+.4g}{spread}{', decided' if gap.decided else ''}"


def _number_of(name: str) -> str:
    """`trial-03` of `trial-03-weight_power=1`."""
    return "-".join(name.split("-")[:2])


def _right(number: bool) -> str:
    return ' class="number"' if number else ""


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _curves(made: _Page, report: SweepReport) -> None:
    made.section(
        f"{report.metric} against images",
        "One line for each trial, from blue for the best value to orange for the worst; the best trial of the best point is thick.",
    )
    made.chart(charts.curves(report, "images"), "against-images")
    if any(trial.seconds for trial in report.trials):
        made.section(
            f"{report.metric} against {report.devices}-seconds",
            f"Seconds of the training steps on all {report.devices}s of a trial, without evaluations and checkpoints.",
        )
        made.chart(charts.curves(report, "seconds"), "against-seconds")


def _settings(made: _Page, report: SweepReport) -> None:
    columns = report.varied()
    parallel = charts.parallel_coordinates(report)
    if parallel is not None:
        made.section(
            "Parallel coordinates",
            "A line for each trial, through its values; a trial without a setting has a gap.",
        )
        made.chart(parallel, "parallel-coordinates", 150 * (len(columns) + 1))
    values = [report.value(trial) for trial in report.trials]
    found = importance(columns, values)
    made.section(
        "Importance of the settings",
        f"Share of the variance of {report.metric} that each setting explains, by a random forest (fANOVA) over all scored trials.",
    )
    if isinstance(found, str):
        made.add(f'<p class="note">Not shown: {_text(found)}</p>')
        return
    made.chart(charts.importance_bars(found), "importance")
    if len(report.scored) < 4 * len(found):
        made.add(
            f'<p class="note">{len(report.scored)} trials are few for {len(found)} settings: take it as a hint.</p>'
        )


def _fronts(made: _Page, report: SweepReport) -> None:
    """For each of `search.objectives`, the trials that no other one beats in it and in the metric."""
    for number, other in enumerate(report.experiment.search.objectives):
        front = front_of(report, other)
        if not front:
            continue
        made.section(
            f"{report.metric} against {other}",
            "Every scored trial; on the line are those that no other trial beats in both: "
            f"{', '.join(_number_of(trial.name) for trial in front)}.",
        )
        made.chart(pareto_chart(report, other), f"pareto-{number}")


def _grids(made: _Page, report: SweepReport) -> None:
    scored = [trial for trial in report.scored if trial.grids]
    if not scored:
        return
    best = next((trial for trial in scored if trial.name == report.winner), scored[0])
    chosen = [("Best", best)] + ([("Worst", scored[-1])] if scored[-1] is not best else [])
    made.section(
        "Samples",
        "The best trial of the best point and the worst trial, each at its best evaluation, from the same noise and labels.",
    )
    made.add('<div class="grids">')
    for title, trial in chosen:
        value = _number(trial.best.metrics[report.metric] if trial.best else None)
        images = [
            f'<img alt="{_text(path.stem)} of {_text(trial.name)}" title="{_text(path.stem)}" '
            f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
            for path in trial.grids[:GRIDS]
        ]
        names = ", ".join(path.stem for path in trial.grids[:GRIDS])
        made.add(
            f"<figure><b>{title}: {_text(value)}</b><div class=images>",
            *images,
            f"</div><figcaption>{_text(trial.name)}: {_text(names)}</figcaption></figure>",
        )
    made.add("</div>")


def _trials(made: _Page, report: SweepReport, base_text: str) -> None:
    made.section(
        "Reproduce a trial",
        "Each command trains one trial anew, as a sweep of its own. The file that it names was written with this page.",
    )
    made.add(f"<details><summary>{_text(report.base_file)}</summary><pre>{_text(base_text)}</pre></details>")
    for trial in [*report.scored, *(t for t in report.trials if t not in report.scored)]:
        value = _number(trial.best.metrics[report.metric] if trial.best else None)
        made.add(
            f"<details><summary>{_text(trial.name)} <span class=soft>{_text(value)}, {_text(_progress(trial))}</span></summary>",
            f"<pre>{_text(trial.command)}</pre>",
            *(f'<p class="note">{_text(line)}</p>' for line in _remarks(report, trial)),
            "</details>",
        )


def _progress(trial: ReportedTrial) -> str:
    return f"{trial.state} at step {trial.step:,} of {trial.trial.experiment.training.steps:,}"


def _remarks(report: SweepReport, trial: ReportedTrial) -> Iterator[str]:
    if trial.best is not None:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in trial.best.metrics.items())
        yield f"Step {trial.best.step:,}: {scores}."
    if trial.cost is not None:
        yield f"Training steps took {_seconds(report, trial.cost)}."
    if trial.failure:
        yield f"Failed: {trial.failure}"


def _environment(made: _Page, report: SweepReport) -> None:
    resources = report.experiment.resources
    facts = {
        **report.environment,
        "sweep file": report.record.file,
        "workers of a trial": f"{resources.workers}, each {resources.cpus_per_worker:g} CPU, {resources.gpus_per_worker:g} GPU",
        "report made": time.strftime("%Y-%m-%d %H:%M"),
    }
    made.section("Environment", "Of the start that is recorded on the sweep's run.")
    made.add(
        "<dl>", *(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in facts.items()), "</dl>"
    )
    settings = flatten(report.record.experiment)
    rows = "".join(
        f"<tr><td>{_text(key)}</td><td class=wrap>{_text(json.dumps(value))}</td></tr>"
        for key, value in settings.items()
        if value is not None
    )
    made.add(
        f"<details><summary>All settings of the sweep</summary><div class=scroll><table>{rows}</table></div></details>"
    )
