"""soflowctl runs: the sweeps of a project folder, or the trials of one."""

from __future__ import annotations

import time

from rich.table import Table

from soflow_platform.cli.terminal import console, plain_table, storage_flag
from soflow_platform.storage.checkpoints import best_evaluation
from soflow_platform.storage.project import ProjectFolder, find_project
from soflow_platform.tuning.lineage import describe
from soflow_platform.tuning.lookup import resolve
from soflow_platform.tuning.record import SweepRecord, all_records
from soflow_platform.tuning.status import sweep_state


def runs_command(sweep: str | None, storage_option: str | None) -> None:
    """Print every sweep of the project folder, or the trials of one."""
    storage = find_project(storage_option)
    screen = console()
    if sweep is not None:
        screen.print(_trials_table(storage, resolve(storage, sweep).record))
        return
    records = all_records(storage)
    if not records:
        hint = f"soflowctl run digits{storage_flag(storage)}"
        screen.print(
            f"no sweeps under {storage.root}; start one with: {hint}", highlight=False, soft_wrap=True
        )
        return
    screen.print(_sweeps_table(storage, records))


def _sweeps_table(storage: ProjectFolder, records: list[SweepRecord]) -> Table:
    table = plain_table("sweep", "started", "state", "trials", "best trial", "score", "registered")
    for record in records:
        metric = record.metric
        best = record.best
        score = best.metrics.get(metric) if best else None
        table.add_row(
            record.id,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(record.created)),
            sweep_state(storage, record),
            str(len(record.trials)),
            best.trial if best else "-",
            "-" if score is None else f"{metric} {score:.4g}",
            f"{best.model} v{best.version}" if best and best.version else "-",
        )
    return table


def _trials_table(storage: ProjectFolder, record: SweepRecord) -> Table:
    metric = record.metric
    lineage = ["trained by"] if record.rungs else []
    table = plain_table("trial", "step", "best step", metric, "checkpoints", *lineage)
    for trial in record.trials:
        published = record.checkpoints(storage, trial.name).published()
        state = published[-1].state if published else None
        best = best_evaluation(state.evaluations, metric, record.mode) if state else None
        table.add_row(
            trial.name,
            f"{state.step if state else 0:,}/{record.steps(trial.name):,}",
            f"{best['step']:,}" if best else "-",
            f"{best[metric]:.4g}" if best else "-",
            str(len(published)),
            *([describe(record.history(trial.name), record.steps(trial.name))] if lineage else []),
        )
    return table
