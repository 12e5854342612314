"""soflowctl evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from soflow_platform.cli.terminal import console, plain_table, progress_bar, quiet_libraries, stdout_to_stderr
from soflow_platform.errors import UserError
from soflow_platform.storage.project import find_project, require_writable

if TYPE_CHECKING:
    from soflow_platform.jobs.evaluate import EvaluateRequest, Score
    from soflow_platform.jobs.targets import EvaluationTarget
    from soflow_platform.storage.project import ProjectFolder
    from soflow_platform.tracking.store import TrackingStore


def evaluate_command(
    request: dict[str, Any],
    address: str | None,
    storage_option: str | None,
    tracking: str | None,
    as_json: bool,
) -> None:
    """Score what was asked for, log it where it belongs, and print it."""
    storage = find_project(storage_option)
    require_writable(storage)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.jobs.evaluate import EvaluateRequest
    from soflow_platform.jobs.log_scores import log_scores
    from soflow_platform.tracking.store import TrackingStore

    require_answer(address)
    quiet_libraries()
    store = TrackingStore(tracking or storage.tracking_uri)
    subject, scores = _with_progress(EvaluateRequest(**request), storage, store, address)
    logged = log_scores(subject, scores, store)
    if as_json:
        print(json.dumps([as_record(score) for score in scores], indent=1))
        return
    _print_scores(scores)
    if logged:
        screen = console()
        where = f"models:/{'/'.join(subject.version)}" if subject.version else f"run {subject.run}"
        screen.print(f"logged to {where}: {', '.join(logged)}", highlight=False)


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
    """A score for other programs."""
    return {
        "subject": score.subject,
        **score.values,
        "spread": score.spread,
        "flags": score.flags,
        "settings": score.tags,
    }


def _with_progress(
    request: EvaluateRequest, storage: ProjectFolder, store: TrackingStore, address: str | None
) -> tuple[EvaluationTarget, list[Score]]:
    from soflow_platform.jobs.evaluate import evaluate

    with progress_bar("images") as update, stdout_to_stderr():
        return evaluate(
            request, storage, store, address, lambda progress: update(progress.done, progress.total)
        )


def _print_scores(scores: Sequence[Score]) -> None:
    """One row for each number of steps, then what has to be said of them."""
    screen = console()
    metrics = list(scores[0].values)
    table = plain_table("images", "steps", "NFE", *metrics)
    for score in scores:
        cells = [
            f"{score.values[name]:.5g}" + (f" ± {score.spread[name]:.2g}" if name in score.spread else "")
            for name in metrics
        ]
        table.add_row(score.subject, score.tags.get("steps", "-"), score.tags.get("nfe", "-"), *cells)
    screen.print(table)
    shown = {k: v for k, v in scores[0].tags.items() if k not in ("steps", "nfe")}
    for name, value in shown.items():
        screen.print(f"{name:<18}{value}", highlight=False)
    flags = dict.fromkeys(flag for score in scores for flag in score.flags)
    for flag in flags:
        screen.print(f"[yellow]note[/yellow]  {flag}", highlight=False)
