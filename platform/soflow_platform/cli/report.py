"""soflowctl report: a sweep as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from soflow_platform.cli.options import StorageOption, TrackingOption


def report(
    sweep: Annotated[
        str, typer.Argument(metavar="SWEEP", help="Id of a sweep or its beginning, or its file's name.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Where to write it; default is the sweep's own folder."),
    ] = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Write a sweep as one HTML page that needs no network: ranking, curves, importance of the settings, samples, cost, and how to
    reproduce each trial."""
    from soflow_platform.cli.terminal import console
    from soflow_platform.errors import UserError
    from soflow_platform.storage.project import find_project, require_writable, require_writable_folder
    from soflow_platform.tuning.lookup import resolve

    project = find_project(storage)
    found = resolve(project, sweep)
    if found.trial is not None:
        raise UserError(f"{found} is a trial: a report is of a sweep, such as {found.record.id}.")
    require_writable(project)
    if out is not None:
        require_writable_folder("--out", out)
    from soflow_platform.jobs.report import write_report
    from soflow_platform.tracking.store import TrackingStore

    record = found.record
    store = TrackingStore(tracking or record.tracking_uri or project.tracking_uri)
    written = write_report(record, project, store, out)
    screen = console()
    screen.print(f"report      {written.page}", highlight=False, soft_wrap=True)
    screen.print(f"reproduce   {written.base}", highlight=False, soft_wrap=True)
    if written.not_logged:
        screen.print(
            f"            not among the run's artifacts: {written.not_logged}",
            highlight=False,
            soft_wrap=True,
        )
