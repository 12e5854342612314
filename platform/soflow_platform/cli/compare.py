"""soflowctl compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from soflow_platform.cli.terminal import console, plain_table, progress_bar, stdout_to_stderr
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder, find_project, require_writable

if TYPE_CHECKING:
    from rich.console import Console

    from soflow_platform.config.comparison import SamplingConfig
    from soflow_platform.jobs.compare import Comparison
    from soflow_platform.tracking.store import TrackingStore
    from soflow_platform.tuning.record import SweepRecord


def compare_command(
    name: str,
    overrides: tuple[str, ...],
    address: str | None,
    storage_option: str | None,
    tracking: str | None,
    costs: bool,
    as_json: bool,
) -> None:
    """Compare the methods of a sweep, print the table, keep it beside the sweep and on its run.

    It is kept before costs are measured and again with them: what fails there leaves the scores.
    """
    storage = find_project(storage_option)
    record, protocol = find_protocol(name, overrides, storage)
    require_writable(storage)
    from rich.console import Console

    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.jobs.compare import compare
    from soflow_platform.jobs.compare_report import save
    from soflow_platform.tracking.store import TrackingStore

    require_answer(address)
    errors = Console(stderr=True)
    store = TrackingStore(tracking or record.tracking_uri or storage.tracking_uri)

    folder = storage.sweep(record.id) / "comparison"

    def say(text: str) -> None:
        errors.print(f"[dim]{text}[/dim]", highlight=False)

    def keep(found: Comparison) -> None:
        _log(record, store, save(found, folder), found)

    with progress_bar("images") as update, stdout_to_stderr():
        found = compare(
            record,
            protocol,
            storage,
            store,
            address,
            lambda progress: update(progress.done, progress.total),
            costs,
            say,
            keep,
        )
    if as_json:
        print(json.dumps(found.as_record(), indent=1))
        return
    _print(console(), found, folder)


def find_protocol(
    name: str, overrides: tuple[str, ...], storage: ProjectFolder
) -> tuple[SweepRecord, tuple[SamplingConfig, ...]]:
    """The sweep meant, and how it is to be sampled: as its file says now where a file is named, else as it said when it ran.

    Raises UserError where no such sweep ran.
    """
    from soflow_platform.config.experiment import Experiment
    from soflow_platform.tuning.lookup import resolve
    from soflow_platform.tuning.record import load_record

    if Path(name).is_file() or overrides:
        from soflow_platform.cli.run import read
        from soflow_platform.tuning.record import sweep_id

        _, experiment, _ = read(name, overrides)
        record = load_record(storage, sweep_id(storage, experiment, again=False))
        if record is None:
            raise UserError(
                f"{name} as it stands has not run under {storage.root}: start it with `soflowctl run {name}`, or name a sweep that "
                "`soflowctl runs` lists."
            )
        return record, experiment.comparison
    found = resolve(storage, name)
    if found.trial is not None:
        raise UserError(f"{found} is one trial: name its sweep, {found.record.id}.")
    return found.record, Experiment(**found.record.experiment).comparison


def _log(record: SweepRecord, store: TrackingStore, paths: list[Path], comparison: Comparison) -> None:
    """The files on the sweep's run."""
    if record.run is None:
        return
    client = store.client
    for path in paths:
        client.log_artifact(record.run, str(path), "comparison")
    client.set_tag(record.run, "comparison.conclusions", " ".join(comparison.conclusions()))


def _print(screen: Console, comparison: Comparison, folder: Path) -> None:
    from soflow_platform.jobs.compare_report import COLUMNS, FILES, TITLES, cells

    for budget in comparison.budgets:
        rows = comparison.of(budget)
        screen.print(f"\n[bold]{TITLES.get(budget, budget)}[/bold]")
        first, *rest = (title.format(distance=comparison.distance) for title in COLUMNS)
        table = plain_table(first, *rest)
        for row in rows:
            table.add_row(*cells(row, row.named(rows)))
        screen.print(table)
    screen.print()
    for sentence in comparison.conclusions():
        screen.print(sentence, highlight=False)
    for flag in dict.fromkeys(flag for row in comparison.rows for flag in row.flags):
        screen.print(f"[yellow]*[/yellow] {flag}", highlight=False)
    for sentence in comparison.left_out:
        screen.print(f"[yellow]left out[/yellow] {sentence}", highlight=False)
    for name in FILES:
        screen.print(f"saved  {folder / name}", highlight=False, soft_wrap=True)
