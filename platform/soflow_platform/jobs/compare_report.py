"""A comparison on paper: a Markdown table, a CSV file, a plot of the distance against the number of evaluations."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from soflow_pipelines.storage.files import write_bytes
from soflow_platform.jobs.compare import Comparison, Row

TITLES = {"steps": "Equal training steps", "evaluations": "Equal network evaluations in training"}
FILES = ("comparison.md", "comparison.csv", "comparison.json", "comparison.png")
COLUMNS = (
    "method",
    "JVP",
    "sampling",
    "trained steps",
    "NFE",
    "{distance}",
    "label agreement",
    "s/step",
    "peak MB",
    "ms/image",
    "speed-up",
)


def save(comparison: Comparison, folder: Path) -> list[Path]:
    """Write FILES, each complete or absent. Returns their paths."""
    record = json.dumps(comparison.as_record(), indent=1)
    contents = (markdown(comparison).encode(), table(comparison).encode(), record.encode(), plot(comparison))
    for name, content in zip(FILES, contents, strict=True):
        write_bytes(folder / name, content)
    return [folder / name for name in FILES]


def markdown(comparison: Comparison) -> str:
    """A table for each budget, what the rows say, and what has to be known of the numbers."""
    lines = [f"# {comparison.sweep}", ""]
    lines += [f"- {sentence}" for sentence in comparison.conclusions()]
    for budget in comparison.budgets:
        rows = comparison.of(budget)
        lines += ["", f"## {TITLES.get(budget, budget)}", ""]
        titles = [title.format(distance=comparison.distance) for title in COLUMNS]
        lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += ["| " + " | ".join(cells(row, row.named(rows))) + " |" for row in rows]
    lines += ["", "## What the numbers are", ""]
    lines += [f"- {name}: {value}" for name, value in comparison.settings.items()]
    counts = sorted({row.samples for row in comparison.rows})
    lines.append(f"- samples: {', '.join(map(str, counts))}")
    if comparison.device is not None:
        lines.append(
            f"- costs: {comparison.device}, one thread, all methods in one run; a step on average over its schedule; peak MB are all "
            "tensors alive at once in training; ms/image in batches of 64; speed-up over DDPM of 1000 steps"
        )
    flags = dict.fromkeys(flag for row in comparison.rows for flag in row.flags)
    lines += [f"- {flag}" for flag in [*flags, *comparison.left_out]]
    return "\n".join(lines) + "\n"


def cells(row: Row, name: str) -> list[str]:
    """One row as text."""
    each = row.nfe // row.steps
    few = "" if row.flags == () else " *"
    return [
        name,
        "yes" if row.uses_jvp else "no",
        row.sampling or "-",
        f"{row.trained_steps:,}",
        f"{row.nfe}" if each == 1 else f"{row.nfe} ({row.steps} x {each})",
        f"{row.distance:.4g}{few}",
        "-" if row.label_agreement is None else f"{row.label_agreement:.3f}",
        "-" if row.step_seconds is None else f"{row.step_seconds:.3f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
        "-" if row.image_seconds is None else f"{1e3 * row.image_seconds:.3f}",
        "-" if row.speedup is None else f"{row.speedup:,.0f}" if row.speedup >= 10 else f"{row.speedup:.2f}",
    ]


def table(comparison: Comparison) -> str:
    """CSV with every field of every row."""
    text = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        writer.writerow({**vars(row), "flags": " ".join(row.flags)})
    return text.getvalue()


def plot(comparison: Comparison) -> bytes:
    """PNG: the distance against the number of evaluations, a line for each way of sampling, a panel for each budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    budgets = comparison.budgets
    figure = Figure(figsize=(6.4 * len(budgets), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    colours: dict[str, str] = {}
    for panel, budget in zip(panels, budgets, strict=True):
        rows = comparison.of(budget)
        lines: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            lines.setdefault((row.named(rows), row.sampling), []).append(row)
        for (name, sampling), points in lines.items():
            points = sorted(points, key=lambda row: row.nfe)
            colour = colours.setdefault(name, f"C{len(colours) % 10}")
            panel.plot(
                [row.nfe for row in points],
                [row.distance for row in points],
                color=colour,
                marker="s" if points[0].uses_jvp else "o",
                linestyle="--" if "guidance" in sampling else "-",
                label=name + (f" ({sampling})" if sampling else ""),
            )
        panel.set(xscale="log", yscale="log", xlabel="NFE", title=TITLES.get(budget, budget))
        ticks = sorted({row.nfe for row in rows})
        panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=90 if len(ticks) > 6 else 0)
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=7, title="squares: Jacobian-vector product", title_fontsize=7)
    panels[0].set_ylabel(comparison.distance)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=140)
    return content.getvalue()
