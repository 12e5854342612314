"""soflowctl compare: the methods of one sweep or of several in one table."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from soflow_platform.cli.options import Places, require_writable_file
from soflow_platform.cli.terminal import console, plain_table, progress_bar, stdout_to_stderr, styled
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder, find_project, require_writable

if TYPE_CHECKING:
    from rich.console import Console

    from soflow_platform.jobs.compare_rows import Comparison
    from soflow_platform.jobs.requests import CompareRequest


@dataclass(frozen=True)
class CopiesRequest:
    """Where a comparison is written beside the sweep's folder."""

    page: Path | None = None
    """A Markdown page that holds the comparison between two lines of its own."""
    plot: Path | None = None
    """PNG of the plot."""

    def check(self) -> None:
        """Raises UserError where a file cannot be written."""
        require_writable_file("--markdown", self.page, ".md")
        require_writable_file("--plot", self.plot, ".png")

    def write(self, comparison: Comparison, names: str, plot: Path) -> None:
        """Write the files; `plot` is the comparison's own PNG. Raises UserError for a page with one of its lines alone."""
        from soflow_pipelines.storage.files import write_bytes
        from soflow_platform.jobs.compare_report import page_with

        if self.plot is not None:
            write_bytes(self.plot, plot.read_bytes())
        if self.page is not None:
            picture = (
                None if self.plot is None else Path(os.path.relpath(self.plot, self.page.parent)).as_posix()
            )
            try:
                text = page_with(
                    self.page.read_text() if self.page.exists() else "", comparison, names, picture
                )
            except ValueError as error:
                raise UserError(f"--markdown {self.page}: {error}.") from None
            write_bytes(self.page, text.encode())


def compare_command(
    sweeps: tuple[str, ...],
    overrides: tuple[str, ...],
    places: Places,
    costs: bool,
    as_json: bool,
    copies: CopiesRequest,
) -> None:
    """Compare the methods of sweeps, print the table, keep it beside the first sweep and on its run.

    The table is kept before costs are measured and again with them, so that a failure there leaves the scores.
    """
    copies.check()
    project = find_project(places.storage)
    request = find_requests(sweeps, overrides, project)
    record = request.record
    require_writable(project)
    from rich.console import Console

    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.evaluation.runner import RayStatisticsRunner
    from soflow_platform.jobs.compare import score_sweep
    from soflow_platform.jobs.compare_report import as_record, conclusions, save
    from soflow_platform.jobs.evaluate import Services
    from soflow_platform.tracking.score_log import log_comparison
    from soflow_platform.tracking.store import TrackingStore

    require_answer(places.address)
    errors = Console(stderr=True)
    store = TrackingStore(places.tracking or record.tracking_uri or project.tracking_uri)
    folder = project.sweep(record.id) / (
        "comparison" if not request.others else f"comparison-{_others(request)}"
    )

    def say(text: str) -> None:
        errors.print(styled((text, "dim")), highlight=False)

    def keep(comparison: Comparison) -> None:
        files = save(comparison, folder)
        names = " ".join(each.name for each in request.records)
        copies.write(comparison, names, next(file for file in files if file.suffix == ".png"))
        if record.run is not None and not request.others:
            log_comparison(store.client, record.run, files, conclusions(comparison))

    with (
        progress_bar("images") as report,
        stdout_to_stderr(),
        RayStatisticsRunner(project, places.address, report) as runner,
    ):
        scored = score_sweep(request, Services(project, store, runner), say)
    keep(comparison := scored.comparison())
    if costs:
        say("measuring seconds and memory, one thread")
        keep(comparison := scored.with_costs().comparison())
    if as_json:
        print(json.dumps(as_record(comparison), indent=1))
        return
    _print(console(), comparison, folder)
    for copy in (copies.page, copies.plot):
        if copy is not None:
            console().print(f"saved  {copy}", highlight=False, soft_wrap=True)


def _others(request: CompareRequest) -> str:
    """Part of a folder's name for the further sweeps of a comparison."""
    ids = "-".join(record.id for record in request.others)
    return ids if len(ids) <= 100 else hashlib.sha256(ids.encode()).hexdigest()[:16]


def find_requests(
    names: tuple[str, ...], overrides: tuple[str, ...], project: ProjectFolder
) -> CompareRequest:
    """The sweeps of these names, sampled in the ways of the first one and what the others add.

    Raises UserError where one never ran or is named twice, and where `overrides` are given for several.
    """
    if overrides and len(names) > 1:
        raise UserError("--set is of one sweep file: name the other sweeps by their ids, without --set.")
    requests = [find_request(name, overrides, project) for name in names]
    first, *others = requests
    ids = [request.record.id for request in requests]
    twice = next((each for each in ids if ids.count(each) > 1), None)
    if twice is not None:
        raise UserError(f"sweep {twice} is named twice: name each once.")
    protocol = tuple(dict.fromkeys(way for request in requests for way in request.protocol))
    return replace(first, protocol=protocol, others=tuple(request.record for request in others))


def find_request(name: str, overrides: tuple[str, ...], project: ProjectFolder) -> CompareRequest:
    """The sweep of this name and its `comparison`: of the file where a file is named, else of the settings that it ran with.

    Raises UserError where no such sweep ran.
    """
    from soflow_platform.config.validation import resolved_experiment
    from soflow_platform.jobs.requests import CompareRequest
    from soflow_platform.tuning.lookup import resolve

    if Path(name).is_file() or overrides:
        from soflow_platform.cli.sweep_file import read
        from soflow_platform.tuning.record import sweep_id
        from soflow_platform.tuning.recorded import sweep_of

        checked = read(name, overrides)
        experiment = checked.experiment
        sweep = sweep_id(project, experiment, again=False)
        record = sweep_of(project, experiment, checked.trials, sweep)
        if record is None:
            raise UserError(
                f"{name} as it stands has not run under {project.root}: start it with `soflowctl run {name}`, or name a sweep that "
                "`soflowctl runs` lists."
            )
        return CompareRequest(record, experiment.comparison)
    found = resolve(project, name)
    if found.trial is not None:
        raise UserError(f"{found} is one trial: name its sweep, {found.record.id}.")
    experiment = resolved_experiment(found.record.experiment, f"sweep {found.record.id}")
    return CompareRequest(found.record, experiment.comparison)


def _print(screen: Console, comparison: Comparison, folder: Path) -> None:
    from soflow_platform.jobs.compare_report import FILES, TITLES, cells, conclusions, titles

    for budget in comparison.budgets:
        rows = comparison.of(budget)
        screen.print(styled("\n", (TITLES.get(budget, budget), "bold")))
        first, *rest = titles(comparison)
        table = plain_table(first, *rest)
        for row in rows:
            table.add_row(*cells(row, row.label(rows), comparison.others))
        screen.print(table)
    screen.print()
    for sentence in conclusions(comparison):
        screen.print(sentence, highlight=False)
    for flag in dict.fromkeys(flag for row in comparison.rows for flag in row.flags):
        screen.print(styled(("*", "yellow"), f" {flag}"), highlight=False)
    for sentence in comparison.left_out:
        screen.print(styled(("left out", "yellow"), f" {sentence}"), highlight=False)
    for name in FILES:
        screen.print(f"saved  {folder / name}", highlight=False, soft_wrap=True)
