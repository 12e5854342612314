"""Options and arguments that several soflowctl commands share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

StorageOption = Annotated[
    str | None,
    typer.Option(
        "--storage", metavar="FOLDER", help="Project folder; default ./soflow-runs, or $SOFLOW_STORAGE."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a setting, such as training.steps=100. Repeatable."
    ),
]
TrackingOption = Annotated[
    str | None,
    typer.Option(
        "--tracking", metavar="URI", help="MLflow tracking URI; default is SQLite in the project folder."
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="A running Ray cluster; default is a local Ray."),
]
SweepArgument = Annotated[
    str,
    typer.Argument(
        metavar="SWEEP",
        help="A sweep file, or the name of one that comes with soflow: digits, methods-digits, methods-cifar10, xl2.",
    ),
]
NameArgument = typer.Argument(
    metavar="SWEEP|TRIAL",
    help="Id of a sweep or its beginning, name of a trial of the newest sweep, or SWEEP/TRIAL.",
)


@dataclass(frozen=True)
class Places:
    """Where a command works: the values of --address, --storage and --tracking."""

    address: str | None = None
    storage: str | None = None
    tracking: str | None = None
