"""Reports of a comparison: conclusions as sentences, Markdown, CSV, JSON, and a plot of distance against function evaluations."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from soflow_core.objectives import SoFlow
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.jobs.compare_rows import Comparison, Row, decided_orders
from soflow_platform.tuning.seed_statistics import FEWEST_PAIRED, SIGNIFICANCE

CLAIMANT = SoFlow
"""The method whose claim, the best distance at one function evaluation, the conclusions confirm or deny."""
TITLES = {"steps": "Equal training steps", "evaluations": "Equal network evaluations in training"}
FILES = ("comparison.md", "comparison.csv", "comparison.json", "comparison.png")
NOT_IN_CSV = ("others", "by_seed")
COLOURS = (
    *(f"C{number}" for number in range(10)),
    *(
        "#393b79",
        "#8c6d31",
        "#637939",
        "#843c39",
        "#7b4173",
        "#5254a3",
        "#bd9e39",
        "#8ca252",
        "#ad494a",
        "#a55194",
    ),
)
"""Of the lines of a plot: matplotlib's ten, and ten darker ones."""
"""Fields of a row that are no column of the CSV file: other metrics have one each, and a row is one trial there."""
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


SPREAD = (
    "numbers are means over them, ± is the standard deviation of one training; an order is called decided by Welch's t-test, or from "
    f"{FEWEST_PAIRED} seeds on by Student's of the differences at equal seeds, with Holm's correction for all pairs that are ranked "
    f"together: the chance that one is called so without a difference is at most {SIGNIFICANCE:.0%}"
)
ONE_SEED = "methods that are close may change places with another one (`search.seeds`)"
BEGIN, END = "<!-- written by soflowctl compare {names} -->", "<!-- until here: {names} -->"
"""Lines of a page between which `soflowctl compare --markdown` writes the comparison of the sweeps of these names."""


def save(comparison: Comparison, folder: Path) -> list[Path]:
    """Write FILES into a folder, each complete or absent. Returns their paths."""
    record = json.dumps(as_record(comparison), indent=1)
    contents = (markdown(comparison).encode(), table(comparison).encode(), record.encode(), plot(comparison))
    for name, content in zip(FILES, contents, strict=True):
        write_bytes(folder / name, content)
    return [folder / name for name in FILES]


def as_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison and its conclusions as JSON data."""
    return {**asdict(comparison), "conclusions": conclusions(comparison)}


def markdown(comparison: Comparison) -> str:
    """Conclusions, a table for each budget, and the settings of the numbers."""
    lines = [f"# {comparison.sweep}", ""]
    lines += [f"- {sentence}" for sentence in conclusions(comparison)]
    for budget in comparison.budgets:
        rows = comparison.of(budget)
        lines += ["", f"## {TITLES.get(budget, budget)}", ""]
        heads = titles(comparison)
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        lines += ["| " + " | ".join(cells(row, row.label(rows), comparison.others)) + " |" for row in rows]
    lines += ["", "## What the numbers are", ""]
    lines += [f"- {name}: {value}" for name, value in comparison.settings.items()]
    counts = sorted({row.samples for row in comparison.rows})
    lines.append(f"- samples: {', '.join(map(str, counts))}")
    seeds = sorted({row.seeds for budget in comparison.budgets for row in comparison.of(budget)})
    lines.append(f"- seeds: {', '.join(map(str, seeds))}; {SPREAD if seeds[-1] > 1 else ONE_SEED}")
    if comparison.device is not None:
        lines.append(
            f"- costs: {comparison.device}, one thread, all methods in one run; a step on average over its schedule; peak MB are all "
            "tensors alive at once in training; ms/image in batches of 64; speed-up over DDPM of 1000 steps"
        )
    lines += _varied(comparison)
    flags = dict.fromkeys(flag for row in comparison.rows for flag in row.flags)
    lines += [f"- {flag}" for flag in flags]
    lines += [f"- left out: {sentence}" for sentence in comparison.left_out]
    return "\n".join(lines) + "\n"


def _varied(comparison: Comparison) -> list[str]:
    """A line on the settings of each method beside its own, where a search varied them."""
    found = {
        row.label(rows): row.varied
        for rows in map(comparison.of, comparison.budgets)
        for row in rows
        if row.varied
    }
    return (
        [f"- settings of the trials: {'; '.join(f'{name}: {varied}' for name, varied in found.items())}"]
        if found
        else []
    )


def page_with(page: str, comparison: Comparison, names: str, picture: str | None) -> str:
    """A Markdown page with the comparison between its two lines of `names`, or at its end where it has none.

    `picture` is the plot's path from the page. Headings stand below those of the page. Raises ValueError where one line stands alone.
    """
    begin, end = BEGIN.format(names=names), END.format(names=names)
    # Where references and autoencoders lie on this machine tells a reader nothing.
    settings = {
        key: Path(value).name if value.startswith("/") else value
        for key, value in comparison.settings.items()
    }
    comparison = replace(comparison, settings=settings)
    title, *body = markdown(comparison).splitlines()
    lines = [
        begin,
        "",
        f"Sweep {title.removeprefix('# ')}:",
        *(f"#{line}" if line.startswith("#") else line for line in body),
        "",
    ]
    if picture is not None:
        lines += [f"![{comparison.distance} against function evaluations]({picture})", ""]
    block = "\n".join([*lines, end])
    if (begin in page) != (end in page):
        raise ValueError(f"it has one of the lines {begin!r} and {end!r}: give it both, or none")
    if begin not in page:
        return f"{page.rstrip()}\n\n{block}\n".lstrip()
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"its line {end!r} stands before {begin!r}: exchange them")
    return before + block + after


def titles(comparison: Comparison) -> list[str]:
    """The heads of the columns of a table; metrics that a sweep reports beside the usual ones are the last."""
    return [*(title.format(distance=comparison.distance) for title in COLUMNS), *comparison.others]


def cells(row: Row, name: str, others: Sequence[str] = ()) -> list[str]:
    """The cells of one row, in the order of `titles`; `name` is the first."""
    nfe_per_step = row.nfe // row.steps
    flagged = "" if row.flags == () else " *"
    return [
        name,
        "yes" if row.uses_jvp else "no",
        row.sampling or "-",
        f"{row.trained_steps:,}",
        f"{row.nfe}" if nfe_per_step == 1 else f"{row.nfe} ({row.steps} x {nfe_per_step})",
        f"{distance(row)}{flagged}",
        "-" if row.label_agreement is None else f"{row.label_agreement:.3f}",
        "-" if row.step_seconds is None else f"{row.step_seconds:.3f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
        "-" if row.image_seconds is None else f"{1e3 * row.image_seconds:.3f}",
        "-" if row.speedup is None else f"{row.speedup:,.0f}" if row.speedup >= 10 else f"{row.speedup:.2f}",
        *(f"{row.others[other]:.4g}" if other in row.others else "-" for other in others),
    ]


def distance(row: Row) -> str:
    """The distance with its spread: `71.3 ± 2.1`."""
    return f"{row.distance:.4g}" if row.spread is None else f"{row.distance:.4g} ± {row.spread:.2g}"


def conclusions(comparison: Comparison) -> list[str]:
    """For each budget, as sentences: the best method at one function evaluation and at any number, and whether the claim holds.

    Of rows with the labels of the sweep's own evaluations: balanced ones make a distance smaller, whatever the method.
    """
    rows = {budget: comparison.of(budget) for budget in comparison.budgets}
    return [
        sentence
        for budget, found in rows.items()
        for sentence in _of_budget(
            budget, comparison.distance, [row for row in found if row.labels is None] or found
        )
    ]


def _of_budget(budget: str, name: str, rows: Sequence[Row]) -> list[str]:
    """The best at one function evaluation, separately for each guidance in training; the best at any number."""
    one_step = sorted((row for row in rows if row.nfe == 1), key=lambda row: row.distance)
    scales = sorted({row.trained_guidance or 1 for row in one_step})
    sentences = []
    for scale in scales:
        same_guidance = [row for row in one_step if (row.trained_guidance or 1) == scale]
        guided = (
            "" if len(scales) == 1 else ", no guidance" if scale == 1 else f", guidance {scale:g} in training"
        )
        sentences += _at_one_evaluation(f"equal {budget}, 1 NFE{guided}", name, same_guidance)
    overall, *others = _best_of_each(rows)
    if overall.nfe > 1:
        sampling = f" ({overall.sampling})" if overall.sampling else ""
        sentences.append(
            f"equal {budget}, any NFE: the best is {overall.label(rows)}{sampling} at {overall.nfe} NFE, {name} "
            f"{distance(overall)}{_undecided([overall, *others])}."
        )
    return sentences


def _best_of_each(rows: Sequence[Row]) -> list[Row]:
    """The best row of each training, best first; of those that a star sets apart only where there are no others."""
    best: dict[str, Row] = {}
    for row in [row for row in rows if not row.flags] or rows:
        name = row.label(rows)
        if name not in best or row.distance < best[name].distance:
            best[name] = row
    return sorted(best.values(), key=lambda row: row.distance)


def _at_one_evaluation(which: str, name: str, rows: Sequence[Row]) -> list[str]:
    """The best of all, the best without a Jacobian-vector product, and the rank of CLAIMANT; `rows` are in order of distance."""
    best = rows[0]
    jvp = "with a Jacobian-vector product" if best.uses_jvp else "without a Jacobian-vector product"
    sentences = [f"{which}: the best is {best.method}, {jvp}, {name} {distance(best)}{_undecided(rows)}."]
    free = [row for row in rows if not row.uses_jvp]
    if best.uses_jvp and free:
        sentences.append(
            f"{which}: the best without a Jacobian-vector product is {free[0].method}, {name} {distance(free[0])}."
        )
    claimant = next((row for row in rows if row.method == CLAIMANT.method), None)
    if claimant is not None:
        sentences.append(
            f"{which}: that {CLAIMANT.__name__} has the best distance {_claim(claimant, rows)} ({name} {distance(claimant)})."
        )
    return sentences


def _near(rows: Sequence[Row], place: int) -> list[Row]:
    """The rows whose order with the one at a place is not decided."""
    decided = decided_orders(rows)
    return [row for i, row in enumerate(rows) if decided.get((min(i, place), max(i, place))) is False]


def _undecided(rows: Sequence[Row]) -> str:
    """The methods that the first of the rows is not decidedly better than, as the end of a sentence; empty where there is none."""
    near = _near(rows, 0)
    if not near:
        return ""
    return ", not decidedly before " + " and ".join(f"{row.label(rows)} ({distance(row)})" for row in near)


def _claim(claimant: Row, rows: Sequence[Row]) -> str:
    """Whether no other row is better, where the spread over seeds allows to say so."""
    rank = rows.index(claimant) + 1
    if rank == 1:
        return "holds" if not _near(rows, 0) else "is not decided: others are within the spread over seeds"
    if rows[0] in _near(rows, rank - 1):
        return f"is not decided: it is {rank} of {len(rows)}, and the best is within the spread over seeds"
    return f"does not hold: it is {rank} of {len(rows)}"


def table(comparison: Comparison) -> str:
    """CSV with every field of every row."""
    text = io.StringIO()
    names = [field.name for field in fields(Row) if field.name not in NOT_IN_CSV] + comparison.others
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in comparison.rows:
        own = {name: value for name, value in vars(row).items() if name not in NOT_IN_CSV}
        writer.writerow({**own, **row.others, "flags": " ".join(row.flags)})
    return text.getvalue()


def plot(comparison: Comparison) -> bytes:
    """PNG of distance against function evaluations: a panel for each budget, a line for each way of sampling."""
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
            lines.setdefault((row.label(rows), row.sampling), []).append(row)
        for (name, sampling), points in lines.items():
            points = sorted(points, key=lambda row: row.nfe)
            colour = colours.setdefault(name, COLOURS[len(colours) % len(COLOURS)])
            panel.plot(
                [row.nfe for row in points],
                [row.distance for row in points],
                color=colour,
                marker="s" if points[0].uses_jvp else "o",
                linestyle="--" if "guidance" in sampling else "-",
                label=name + (f" ({sampling})" if sampling else ""),
            )
            if all(row.spread is not None for row in points):
                spreads = [row.spread or 0.0 for row in points]
                panel.errorbar(
                    [row.nfe for row in points],
                    [row.distance for row in points],
                    yerr=[
                        # A logarithmic axis has no place for what is not above 0.
                        [
                            min(spread, 0.99 * row.distance)
                            for spread, row in zip(spreads, points, strict=True)
                        ],
                        spreads,
                    ],
                    fmt="none",
                    ecolor=colour,
                    capsize=2,
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
