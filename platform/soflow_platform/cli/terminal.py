"""How soflowctl prints: whole names where the output is no terminal, tables without lines."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from soflow_platform.storage.project import ProjectFolder, find_project

FILE_WIDTH = 200
"""Columns where the output is no terminal, so that a log or a pipe gets whole names."""


def console() -> Console:
    """The terminal; or a log, which is not wrapped."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=FILE_WIDTH)


def plain_table(name: str, *columns: str) -> Table:
    """A table without lines, whose first column is never shortened: it holds what the next command needs."""
    table = Table(box=None, pad_edge=False)
    table.add_column(name, no_wrap=True, overflow="fold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def storage_flag(storage: ProjectFolder) -> str:
    """The option that finds this project folder again, where it is not the default one."""
    return "" if find_project(None) == storage else f" --storage {storage.root}"


def duration(seconds: float) -> str:
    """Two units at most: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
