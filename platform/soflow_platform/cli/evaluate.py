"""soflowctl evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from soflow_platform.cli.options import Places
from soflow_platform.cli.terminal import (
    console,
    plain_table,
    progress_bar,
    quiet_libraries,
    stdout_to_stderr,
    styled,
)
from soflow_platform.errors import UserError
from soflow_platform.storage.project import find_project, require_writable

if TYPE_CHECKING:
    from soflow_platform.jobs.evaluate import Score
    from soflow_platform.jobs.requests import EvaluateRequest


def evaluate_command(request: EvaluateRequest, places: Places, as_json: bool) -> None:
    """Score the target, log the scores on its run or registered version, and print them."""
    project = find_project(places.storage)
    require_writable(project)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.evaluation.runner import RayStatisticsRunner
    from soflow_platform.jobs.evaluate import Services, evaluate
    from soflow_platform.jobs.log_scores import log_scores
    from soflow_platform.tracking.store import TrackingStore

    require_answer(places.address)
    quiet_libraries()
    store = TrackingStore(places.tracking or project.tracking_uri)
    with (
        progress_bar("images") as report,
        stdout_to_stderr(),
        RayStatisticsRunner(project, places.address, report) as runner,
    ):
        target, scores = evaluate(request, Services(project, store, runner))
    logged = log_scores(target, scores, store)
    if as_json:
        print(json.dumps([as_record(score) for score in scores], indent=1))
        return
    _print_scores(scores)
    if logged:
        place = f"models:/{'/'.join(target.version)}" if target.version else f"run {target.run}"
        console().print(f"logged to {place}: {', '.join(logged)}", highlight=False)


def parse_list(option: str, text: str) -> tuple[str, ...]:
    """`a,b` -> (a, b). Raises UserError where nothing is named."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"{option} {text!r} names nothing.")
    return names


def parse_steps(text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4). Raises UserError where one is no number above 0."""
    names = parse_list("--steps", text)
    wrong = [name for name in names if not name.isdigit() or int(name) < 1]
    if wrong:
        raise UserError(f"--steps {text!r}: {wrong[0]!r} is no number of steps; give numbers such as 1,2,4.")
    return tuple(dict.fromkeys(int(name) for name in names))


def as_record(score: Score) -> dict[str, Any]:
    """A score as JSON data."""
    return {
        "subject": score.name,
        **score.values,
        "spread": score.spread,
        "flags": score.flags,
        "settings": score.tags,
    }


def _print_scores(scores: Sequence[Score]) -> None:
    """Print a table with a row for each number of steps, then the settings and the notes."""
    screen = console()
    metrics = list(scores[0].values)
    table = plain_table("images", "steps", "NFE", *metrics)
    for score in scores:
        cells = [
            f"{score.values[name]:.5g}" + (f" ± {score.spread[name]:.2g}" if name in score.spread else "")
            for name in metrics
        ]
        table.add_row(score.name, score.tags.get("steps", "-"), score.tags.get("nfe", "-"), *cells)
    screen.print(table)
    shared = {k: v for k, v in scores[0].tags.items() if k not in ("steps", "nfe")}
    for name, value in shared.items():
        screen.print(f"{name:<18}{value}", highlight=False)
    flags = dict.fromkeys(flag for score in scores for flag in score.flags)
    for flag in flags:
        screen.print(styled(("note", "yellow"), f"  {flag}"), highlight=False)
