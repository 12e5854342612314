"""soflowctl plan: what a sweep computes, keeps, sends and costs, before anything is spent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_platform.cli.sweep_file import CheckedSweep
from soflow_platform.cli.terminal import console, duration, plain_table, styled
from soflow_platform.tuning.plan import SweepPlan, TrialPlan, plan_sweep
from soflow_platform.tuning.plan_assumptions import Assumptions

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 6
"""Numbers of trials in a row of the table."""
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def plan_command(sweep: CheckedSweep, assumptions: Assumptions, timed: bool, as_json: bool) -> None:
    """Print the plan of a sweep; `timed` has hours and money also where its trials ask for no GPUs."""
    plan = plan_sweep(sweep.experiment, sweep.trials, assumptions)
    if as_json:
        print(json.dumps(as_record(plan), indent=2))
        return
    timed = timed or plan.on_gpus
    screen = console()
    screen.print(styled((plan.name, "bold"), f": {plan.description}"))
    screen.print(plan_table(plan, timed))
    for title, text in [*amount_lines(plan), *(time_lines(plan) if timed else []), *notes(plan)]:
        screen.print(styled((f"{title:<12}", "bold"), text), soft_wrap=True)


def plan_table(plan: SweepPlan, timed: bool) -> Table:
    """A row for the trials that cost the same."""
    columns = _COLUMNS if timed else _COLUMNS[:-2]
    table = plain_table("trials", *(title for title, _ in columns))
    for label, trial in _alike(plan.trials):
        table.add_row(label, *(cell(trial) for _, cell in columns))
    return table


def short_plan(plan: SweepPlan) -> str:
    """The plan in a line or two: FLOPs, and time and money where trials ask for GPUs."""
    flops = amount(sum(trial.total_flops for trial in plan.trials), "FLOP")
    text = f"{len(plan.trials)} trial(s), {flops}"
    if plan.on_gpus:
        text += f"; {_spending(plan, 1.0)}, {_assumed(plan)} (`soflowctl plan` for other GPUs)"
    return text


def space_note(plan: SweepPlan, folder: Path, free: int) -> str | None:
    """That the kept checkpoints of a sweep do not fit on the disk of their folder, which has `free` bytes; None where they do."""
    kept = sum(trial.kept_bytes for trial in plan.trials)
    if kept <= free:
        return None
    return (
        f"note: the kept checkpoints of all trials come to {amount(kept, 'B')}, and the disk of {folder} has {amount(free, 'B')} free. "
        "A trial that finds it full waits for some minutes and then fails: keep fewer (training.keep_checkpoints), or name another "
        "--storage."
    )


def amount_lines(plan: SweepPlan) -> list[tuple[str, str]]:
    """Title and text of each line on FLOPs and bytes."""
    largest = max(plan.trials, key=lambda trial: trial.memory.total)
    memory, longest = largest.memory, max(plan.trials, key=lambda trial: trial.images)
    parts = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "moments": memory.moments,
        "EMA": memory.averages,
        "activations": memory.activations,
    }
    named = ", ".join(f"{amount(b, 'B')} {part}" for part, b in parts.items() if b is not None)
    read = amount(largest.resume_bytes, "B")
    resumed = f"; a trial that goes on reads {read} to that memory" if largest.resume_bytes else ""
    return [
        ("compute", f"{amount(sum(trial.total_flops for trial in plan.trials), 'FLOP')} in all"),
        ("memory", f"{amount(memory.total, 'B')} on {'a GPU' if plan.on_gpus else 'a worker'}: {named}"),
        (
            "data",
            f"{amount(longest.data_bytes, 'B')} read by a trial: {longest.images:,} images, "
            f"{amount(longest.data_bytes / longest.images, 'B')} each",
        ),
        (
            "checkpoints",
            f"{amount(largest.checkpoint_bytes, 'B')} each, from a copy of {amount(largest.host_copy_bytes, 'B')} in the first "
            f"worker's host memory; {amount(sum(t.kept_bytes for t in plan.trials), 'B')} kept and "
            f"{amount(sum(t.written_bytes for t in plan.trials), 'B')} written by all trials{resumed}",
        ),
        ("network", f"{amount(sum(t.network_bytes for t in plan.trials), 'B')} sent between workers"),
    ]


def time_lines(plan: SweepPlan) -> list[tuple[str, str]]:
    """Title and text of each line on hours and money, and what they rest on."""
    longest = max(plan.trials, key=lambda trial: trial.hours)
    lines = [
        (
            "a trial",
            f"{duration(3600 * longest.hours)} on {longest.gpus:g} GPU(s): training {duration(longest.steps * longest.step_seconds)}, "
            f"scoring {duration(longest.scoring_seconds)}, checkpoints {duration(longest.saving_seconds)}",
        ),
        ("all trials", f"{_spending(plan, 1.0)}; {plan.concurrent} at a time on {plan.gpus:g} GPU(s)"),
    ]
    if plan.asha_share is not None:
        lines.append(("with asha", f"about {_spending(plan, plan.asha_share)}, for trials end at rungs"))
    assumed = f"{_assumed(plan)}; 400 Gb/s between nodes for each GPU; checkpoints copied at 25 GB/s"
    return [*lines, ("assumed", assumed)]


def notes(plan: SweepPlan) -> list[tuple[str, str]]:
    """Title and text of each line on what does not fit or is left out."""
    return [("note", note) for note in plan.notes]


def as_record(plan: SweepPlan) -> dict[str, Any]:
    """The plan as plain data; units are in the names, or FLOP, bytes and seconds."""
    record = dataclasses.asdict(plan)
    for trial, planned in zip(record["trials"], plan.trials, strict=True):
        trial["memory"]["total"] = planned.memory.total
        trial |= {"hours": planned.hours, "gpu_hours": planned.gpu_hours}
    record["assumptions"]["price"] = plan.assumptions.hour
    return record | {"gpu_hours": plan.gpu_hours, "days": plan.days, "price": plan.price}


def amount(value: float, unit: str) -> str:
    """A number with three digits and a decimal prefix: `13.5 GB`."""
    power = 0
    while value >= 999.5 and power < len(PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {PREFIXES[power]}{unit}"


def _spending(plan: SweepPlan, share: float) -> str:
    """GPU-hours, time and money for a share of all steps."""
    return (
        f"{_rounded(plan.gpu_hours * share)} GPU-hours, {duration(86_400 * plan.days * share)}, "
        f"{plan.price * share:,.0f} {plan.assumptions.currency}"
    )


def _assumed(plan: SweepPlan) -> str:
    given = plan.assumptions
    return f"{given.gpu} at {100 * given.utilization:g}% of its peaks and {given.hour:g} {given.currency} an hour"


def _alike(trials: list[TrialPlan]) -> list[tuple[str, TrialPlan]]:
    """Trials with the same cells as one row: their numbers, as they stand in their names."""
    rows: dict[tuple[str, ...], list[TrialPlan]] = {}
    for trial in trials:
        rows.setdefault(tuple(cell(trial) for _, cell in _COLUMNS), []).append(trial)
    return [(_numbers([trial.name for trial in alike]), alike[0]) for alike in rows.values()]


def _numbers(names: list[str]) -> str:
    """`00 02 03`, or `00 02 ... 23 (16)` of many."""
    numbers = [name.removeprefix("trial-").partition("-")[0] for name in names]
    if len(numbers) <= SHOWN:
        return " ".join(numbers)
    return f"{' '.join(numbers[: SHOWN - 1])} ... {numbers[-1]} ({len(numbers)})"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


_COLUMNS: tuple[tuple[str, Callable[[TrialPlan], str]], ...] = (
    ("method", lambda trial: trial.method),
    ("steps", lambda trial: f"{trial.steps:,}"),
    ("parameters", lambda trial: f"{trial.parameters / 1e6:.1f} M"),
    ("forward", lambda trial: f"{trial.forward_gmac:.4g} GMAC"),
    ("passes", lambda trial: f"{trial.forwards:.4g}"),
    ("an image", lambda trial: amount(trial.image_flops, "FLOP")),
    ("a step", lambda trial: amount(trial.step_flops, "FLOP")),
    ("in all", lambda trial: amount(trial.total_flops, "FLOP")),
    ("memory", lambda trial: amount(trial.memory.total, "B")),
    ("step takes", lambda trial: f"{_rounded(1000 * trial.step_seconds)} ms"),
    ("GPU-hours", lambda trial: _rounded(trial.gpu_hours)),
)
