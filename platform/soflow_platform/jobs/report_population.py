"""The part of a sweep's report on its population (`search.pbt`): what each rung decided, and what each trial went through."""

from __future__ import annotations

import html
from collections.abc import Iterator

from soflow_platform.tuning.lineage import Rung, describe_settings, short_name
from soflow_platform.tuning.record import SweepRecord


def population_parts(record: SweepRecord) -> Iterator[str]:
    """HTML of two tables, the decisions and the lineages; nothing for a sweep that had no rung of a population."""
    if not record.rungs:
        return
    yield from _table(
        ["step", "trial", "score", "goes on from", "score", "before", "after"], _decisions(record)
    )
    yield from _table(["trial", "steps", "trained by", "settings"], _lineages(record))


def _decisions(record: SweepRecord) -> Iterator[list[str]]:
    for rung in record.rungs:
        if not rung.replaced:
            yield [f"{rung.step:,}", "-", "", "none is replaced", "", "", ""]
        for each in rung.replaced:
            yield [
                f"{rung.step:,}",
                short_name(each.trial),
                _score(rung, each.trial),
                short_name(each.source),
                _score(rung, each.source),
                describe_settings(each.before),
                describe_settings(each.after),
            ]


def _lineages(record: SweepRecord) -> Iterator[list[str]]:
    for entry in record.trials:
        history = record.history(entry.name)
        ends = [*(interval.after for interval in history[1:]), record.steps(entry.name)]
        for place, (interval, end) in enumerate(zip(history, ends, strict=True)):
            yield [
                "" if place else short_name(entry.name),
                f"{interval.after + 1:,} to {end:,}",
                short_name(interval.trial),
                describe_settings(interval.settings),
            ]


def _score(rung: Rung, trial: str) -> str:
    score = rung.scores.get(trial)
    return "nan" if score is None else f"{score:.4g}"


def _table(titles: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
    for row in rows:
        yield f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
    yield "</tbody></table></div>"
