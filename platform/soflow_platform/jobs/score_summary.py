"""Scores of one way of sampling under several seeds as mean and standard deviation, and their plot."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soflow_platform.jobs.evaluate import Score
from soflow_platform.tuning.seed_statistics import SeedMean

SEED = "seed"
VARIED = ("ema_length", "sampling_scale", "labels", "steps", "nfe")
"""Settings in which the scores of one command can differ, beside the seed."""


@dataclass(frozen=True)
class ScoreSummary:
    """The scores of one way of sampling, over its seeds."""

    name: str
    values: dict[str, float]
    """Mean of each metric over the seeds."""
    spread: dict[str, float]
    """Standard deviation over the seeds; of one seed, what the metric itself gives."""
    tags: dict[str, str]
    """Settings without the seed."""
    seeds: tuple[str, ...]
    """Every seed; empty for images that no seed made."""

    def cell(self, metric: str) -> str:
        """`12.345 ± 0.67`, without the part after the mean where no spread is known."""
        spread = f" ± {self.spread[metric]:.2g}" if metric in self.spread else ""
        return f"{self.values[metric]:.5g}{spread}"


def summaries(scores: Sequence[Score]) -> list[ScoreSummary]:
    """A summary for each set of settings but for the seed, in the order in which they come first."""
    groups: dict[tuple[tuple[str, str], ...], list[Score]] = {}
    for score in scores:
        key = tuple(sorted((name, value) for name, value in score.tags.items() if name != SEED))
        groups.setdefault(key, []).append(score)
    return [_summary(group) for group in groups.values()]


def _summary(scores: Sequence[Score]) -> ScoreSummary:
    first = scores[0]
    means = {name: SeedMean.of([score.values[name] for score in scores]) for name in first.values}
    return ScoreSummary(
        first.name,
        {name: each.mean for name, each in means.items()},
        first.spread
        if len(scores) == 1
        else {name: each.std for name, each in means.items() if each.std is not None},
        {name: value for name, value in first.tags.items() if name != SEED},
        tuple(score.tags[SEED] for score in scores if SEED in score.tags),
    )


def varied(rows: Sequence[ScoreSummary]) -> list[str]:
    """Settings in which the rows differ, of those that a command varies."""
    return [name for name in VARIED if len({row.tags.get(name) for row in rows}) > 1]


AXES = {"ema_length": "EMA length", "sampling_scale": "guidance scale"}
"""What scores are drawn against, where they differ in it: the setting and the title of its axis."""


def plot(rows: Sequence[ScoreSummary]) -> bytes:
    """PNG with a panel for each metric against the length of the EMA or guidance, or against function evaluations where neither varies.

    A line joins the rows that differ in nothing else; bars are the standard deviation over seeds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    differing = varied(rows)
    across = next((name for name in AXES if name in differing), "nfe")
    others = [name for name in differing if name != across and not (across == "nfe" and name == "steps")]
    metrics = list(rows[0].values)
    figure = Figure(figsize=(4.4 * len(metrics), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(metrics), squeeze=False)[0]
    lines: dict[str, list[ScoreSummary]] = {}
    for row in rows:
        label = ", ".join(f"{name} {row.tags.get(name)}" for name in others if name != "steps")
        lines.setdefault(label, []).append(row)
    for panel, metric in zip(panels, metrics, strict=True):
        for label, points in lines.items():
            points = sorted(points, key=lambda row: float(row.tags[across]))
            panel.errorbar(
                [float(row.tags[across]) for row in points],
                [row.values[metric] for row in points],
                [row.spread.get(metric, 0.0) for row in points],
                marker="o",
                capsize=3,
                label=label or None,
            )
        panel.set(title=metric, xlabel=AXES.get(across, "NFE"))
        panel.grid(alpha=0.3)
        if any(lines):
            panel.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    return content.getvalue()
