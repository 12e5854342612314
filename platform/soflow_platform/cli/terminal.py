"""Terminal output that commands share: console, tables, progress bars, durations, quiet libraries."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from soflow_core.failures import printable
from soflow_platform.storage.project import ProjectFolder, find_project

if TYPE_CHECKING:
    from soflow_platform.cluster.actor_pool import Progress, Report

LINE_SECONDS = 60.0
"""Between two lines of progress where there is no terminal."""
FILE_WIDTH = 200
"""Columns of output that goes to a file or a pipe, so that names are not cut."""


def console() -> Console:
    """A console for standard output: as wide as the terminal, or FILE_WIDTH columns where it is a file or a pipe.

    It takes no markup: names and descriptions are shown as they are. `styled` makes text of several styles.
    """
    terminal = Console(markup=False, emoji=False)
    return terminal if terminal.is_terminal else Console(width=FILE_WIDTH, markup=False, emoji=False)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Text of several parts, plain or (text, style); what does not print is escaped."""
    return Text.assemble(
        *(
            printable(part, newlines=True)
            if isinstance(part, str)
            else (printable(part[0], newlines=True), part[1])
            for part in parts
        )
    )


def plain_table(name: str, *columns: str) -> Table:
    """A table without lines. Its first column is never shortened, because it holds names that the next command needs."""
    table = Table(box=None, pad_edge=False)
    table.add_column(name, no_wrap=True, overflow="fold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


class DescribedReport(Protocol):
    """Moves a bar, whose description may be given anew."""

    def __call__(self, progress: Progress, text: str = ...) -> None: ...


@contextlib.contextmanager
def progress_bar(description: str, waiting: str = "opening") -> Iterator[DescribedReport]:
    """A bar on stderr for the length of a block. Yields the report that moves it; `waiting` is shown until its first call."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(waiting, total=None)

    def report(progress: Progress, text: str = description) -> None:
        bar.update(task, description=text, completed=progress.done, total=progress.total)

    with bar:
        yield report


@contextlib.contextmanager
def image_progress(description: str) -> Iterator[Report]:
    """As `progress_bar`, with images per second; where stderr is no terminal, a line a minute."""
    printed = time.monotonic()
    # What was there before, and the start of the workers, do not belong to the rate.
    first: tuple[float, int] | None = None
    with progress_bar(description) as bar:
        terminal = Console(stderr=True).is_terminal

        def report(progress: Progress) -> None:
            nonlocal first, printed
            now = time.monotonic()
            first = first or (now, progress.done)
            done, seconds = progress.done - first[1], now - first[0]
            rate = done / seconds if seconds > 0 else 0.0
            bar(progress, f"{description}, {rate:.1f}/s" if rate else description)
            if not terminal and rate and now - printed >= LINE_SECONDS:
                printed = now
                remaining = duration((progress.total - progress.done) / rate)
                line = f"{description}: {progress.done} of {progress.total}, {rate:.1f}/s, {remaining} left"
                print(line, file=sys.stderr, flush=True)

        yield report


def stdout_to_stderr() -> contextlib.redirect_stdout[Any]:
    """Redirects prints to stderr for the length of a block: Ray prints messages about lost workers to stdout, which is for results."""
    return contextlib.redirect_stdout(sys.stderr)


def quiet_libraries() -> None:
    """Silence warnings of diffusers and of the Hugging Face client, which repeat what our own error sentence says."""
    for name in ("diffusers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def storage_flag(storage: ProjectFolder) -> str:
    """` --storage FOLDER`, for a command line to be copied; empty where the folder is the default one."""
    return "" if find_project(None) == storage else f" --storage {shlex.quote(str(storage.root))}"


def tracking_flag(storage: ProjectFolder, uri: str | None) -> str:
    """` --tracking URI`, for a command line to be copied; empty where the store is that of the project folder."""
    return "" if uri in (None, storage.tracking_uri) else f" --tracking {shlex.quote(str(uri))}"


def duration(seconds: float) -> str:
    """A duration in at most two units: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
