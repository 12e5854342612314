"""soflowctl evaluate."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_platform.cli.options import MOST_STEPS, RECORDED, Places, require_writable_file
from soflow_platform.cli.terminal import (
    console,
    plain_table,
    progress_bar,
    quiet_libraries,
    stdout_to_stderr,
    styled,
)
from soflow_platform.errors import UserError
from soflow_platform.jobs.requests import StepSearch
from soflow_platform.storage.project import find_project, require_writable

if TYPE_CHECKING:
    from soflow_platform.jobs.evaluate import Score, Services
    from soflow_platform.jobs.requests import EvaluateRequest
    from soflow_platform.jobs.search_steps import FoundSteps
    from soflow_platform.jobs.targets import EvaluationTarget

SHOWN = 8
"""Names of logged metrics that are printed."""
HEADINGS = {"ema_length": "length", "sampling_scale": "guidance", "labels": "labels"}
"""Columns of what a command varies beside steps."""


def evaluate_command(
    request: EvaluateRequest, places: Places, as_json: bool, plot: Path | None = None
) -> None:
    """Score the target, log the scores on its run or registered version, and print them."""
    from soflow_pipelines.storage.files import write_bytes
    from soflow_platform.jobs.evaluate import evaluate
    from soflow_platform.jobs.score_summary import plot as draw
    from soflow_platform.jobs.score_summary import summaries

    require_writable_file("--plot", plot, ".png")
    with scoring_services(places) as services:
        target, scores = evaluate(replace(request, plotted=plot is not None), services)
    logged = _logged(target, scores, services)
    if plot is not None:
        write_bytes(plot, draw(summaries(scores)))
    if as_json:
        print(json.dumps([as_record(score) for score in scores], indent=1))
        return
    print_scores(scores)
    sampling = request.sampling
    if target.weights is not None and not (sampling.steps or sampling.settings or sampling.guidance):
        console().print(f"sampled {RECORDED}", highlight=False)
    _print_logged(target, logged)


def search_command(request: EvaluateRequest, search: StepSearch, places: Places, as_json: bool) -> None:
    """Search the time grid of the target's sampler, log the scores of what was found, and print them."""
    from soflow_platform.jobs.search_steps import search_steps

    with scoring_services(places) as services:
        target, results = search_steps(request, search, services)
    logged = _logged(target, [score for result in results for score in result.scores], services)
    if as_json:
        print(json.dumps([_search_record(result) for result in results], indent=1))
        return
    for result in results:
        _print_search(result)
    _print_logged(target, logged)


def step_search(
    trials: int | None, seeds: int | None, times: str | None, plot: Path | None, scales: Sequence[float]
) -> StepSearch:
    """The search of --search-trials and --seeds. Raises UserError for options that do not go with --search-steps."""
    if times is not None:
        raise UserError("--search-steps looks for the times: leave --times out, and say how many --steps.")
    if plot is not None:
        raise UserError("--search-steps draws nothing: leave --plot out.")
    if len(scales) > 1:
        raise UserError("--search-steps takes one guidance scale: give one with --guidance.")
    if seeds == 1:
        raise UserError(
            "--search-steps compares over several seeds: give --seeds 2 or more, or leave it out."
        )
    default = StepSearch()
    return StepSearch(trials or default.trials, seeds or default.seeds)


@contextlib.contextmanager
def scoring_services(places: Places) -> Iterator[Services]:
    """Project folder, tracking store and runner of a scoring command, with a bar on stderr."""
    project = find_project(places.storage)
    require_writable(project)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.evaluation.runner import RayStatisticsRunner
    from soflow_platform.jobs.evaluate import Services
    from soflow_platform.tracking.store import TrackingStore

    require_answer(places.address)
    quiet_libraries()
    store = TrackingStore(places.tracking or project.tracking_uri)
    with (
        progress_bar("images") as report,
        stdout_to_stderr(),
        RayStatisticsRunner(project, places.address, report) as runner,
    ):
        yield Services(project, store, runner)


def _logged(target: EvaluationTarget, scores: Sequence[Score], services: Services) -> list[str]:
    from soflow_platform.jobs.log_scores import log_scores

    return log_scores(target, scores, services.store)


def _print_logged(target: EvaluationTarget, logged: Sequence[str]) -> None:
    if logged:
        place = f"models:/{'/'.join(target.version)}" if target.version else f"run {target.run}"
        named = ", ".join(logged[:SHOWN]) + (
            f" and {len(logged) - SHOWN} more" if len(logged) > SHOWN else ""
        )
        console().print(f"logged to {place}: {named}", highlight=False)


def parse_list(option: str, text: str) -> tuple[str, ...]:
    """`a,b` -> (a, b). Raises UserError where nothing is named."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"{option} {text!r} names nothing.")
    return names


def parse_steps(text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4). Raises UserError where one is no number above 0."""
    names = parse_list("--steps", text)
    wrong = [name for name in names if not _is_number_of_steps(name)]
    if wrong:
        raise UserError(
            f"--steps {text!r}: {wrong[0]!r} is no number of steps; give numbers from 1 to {MOST_STEPS:,}, such as 1,2,4."
        )
    return tuple(dict.fromkeys(int(name) for name in names))


def _is_number_of_steps(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MOST_STEPS


def parse_scales(text: str) -> tuple[float, ...]:
    """`1,2.5` -> (1.0, 2.5). Raises UserError where one is no number."""
    scales = []
    for name in parse_list("--guidance", text):
        try:
            scales.append(float(name))
        except ValueError:
            scales.append(math.nan)
        if not math.isfinite(scales[-1]):
            raise UserError(
                f"--guidance {text!r}: {name!r} is no guidance scale; give numbers such as 1,2,3."
            )
    return tuple(dict.fromkeys(scales))


def as_record(score: Score) -> dict[str, Any]:
    """A score as JSON data."""
    return {
        "subject": score.name,
        **score.values,
        "spread": score.spread,
        "flags": score.flags,
        "settings": score.tags,
    }


def _search_record(result: FoundSteps) -> dict[str, Any]:
    """The result of a search as JSON data."""
    default, found = result.at_search
    return {
        "steps": result.steps,
        "metric": result.metric,
        "tried": result.tried,
        "default": {"times": list(result.default.times), "at_search": default},
        "found": {"times": list(result.found.times), "at_search": found, "option": result.found.option},
        "held_out": [
            {
                "labels": row.found.tags["labels"],
                "seeds": list(row.found.seeds),
                "default": {"values": row.default.values, "spread": row.default.spread},
                "found": {"values": row.found.values, "spread": row.found.spread},
                "gain": row.gain,
                "noise": row.noise,
                "better": row.is_better,
            }
            for row in result.rows
        ],
        "file": str(result.path),
    }


def print_scores(scores: Sequence[Score]) -> None:
    """Print a table with a row for each way of sampling, then the settings and the notes."""
    from soflow_platform.jobs.score_summary import summaries, varied

    screen = console()
    rows = summaries(scores)
    metrics = list(scores[0].values)
    columns = [name for name in varied(rows) if name in HEADINGS]
    table = plain_table("images", *(HEADINGS[name] for name in columns), "steps", "NFE", *metrics)
    for row in rows:
        settings = (row.tags.get(name, "-") for name in (*columns, "steps", "nfe"))
        table.add_row(row.name, *settings, *map(row.cell, metrics))
    screen.print(table)
    shared = {
        name: value
        for name, value in scores[0].tags.items()
        if name not in ("steps", "nfe", "seed", *columns)
        if all(score.tags.get(name) == value for score in scores)
    }
    if rows[0].seeds:
        shared |= {"seeds" if len(rows[0].seeds) > 1 else "seed": ", ".join(rows[0].seeds)}
    for name, value in shared.items():
        screen.print(f"{name:<18}{value}", highlight=False)
    _print_flags(scores)


def _print_flags(scores: Sequence[Score]) -> None:
    flags = dict.fromkeys(flag for score in scores for flag in score.flags)
    for flag in flags:
        console().print(styled(("note", "yellow"), f"  {flag}"), highlight=False)


def _print_search(result: FoundSteps) -> None:
    """Print both grids with their scores under the seeds that the search did not see, and how to use the one found."""
    screen = console()
    metrics = list(result.rows[0].found.values)
    table = plain_table("times", "labels", "NFE", *metrics)
    for row in result.rows:
        for name, grid, summary in (
            ("default", result.default, row.default),
            ("found", result.found, row.found),
        ):
            times = ", ".join(f"{time:.3g}" for time in grid.times)
            table.add_row(
                f"{name}: {times}",
                summary.tags["labels"],
                summary.tags["nfe"],
                *map(summary.cell, metrics),
            )
    screen.print(table)
    tags, seeds = result.rows[0].found.tags, ", ".join(result.rows[0].found.seeds)
    default, found = result.at_search
    screen.print(
        f"{result.steps} steps, {result.tried} grids tried; scored above on {tags['samples']} samples with the seeds {seeds}. On the "
        f"search's own noise {result.metric} was {found:.5g}, on the default grid {default:.5g}.",
        highlight=False,
    )
    for row in result.rows:
        labels = row.found.tags["labels"]
        verdict = (
            "better by more than the noise"
            if row.is_better
            else "no better than the default beyond the noise"
        )
        screen.print(
            f"labels {labels}: {verdict} ({result.metric} better by {row.gain:.3g}, noise {row.noise:.3g})",
            highlight=False,
        )
    screen.print(f"{result.found.option}, or the section in {result.path}", highlight=False)
    _print_flags(result.scores)
