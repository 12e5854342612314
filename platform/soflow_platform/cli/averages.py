"""soflowctl ema: averages of a trial's weights whose length is chosen after training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soflow_platform.cli.options import AddressOption, Places, StorageOption, TrackingOption
from soflow_platform.cli.terminal import plain_table, quiet_libraries, stdout_to_stderr
from soflow_platform.errors import UserError
from soflow_platform.storage.project import find_project, require_writable

if TYPE_CHECKING:
    from soflow_platform.jobs.posthoc_ema import EmaRequest


def ema(
    trial: Annotated[
        str,
        typer.Argument(metavar="SWEEP/TRIAL", help="A trial that was trained with training.ema_profiles."),
    ],
    length: Annotated[
        str,
        typer.Option(help="Relative widths of the averages, such as 0.05,0.1: above 0 and below 0.28."),
    ],
    step: Annotated[
        int | None, typer.Option(min=1, help="Step at which they end; default: the last snapshot's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the weights; default: that of the trial."),
    ] = None,
    register: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Register each as a version of this model; the last becomes its candidate."
        ),
    ] = None,
    score: Annotated[
        int | None, typer.Option(metavar="IMAGES", min=2, help="Score each with as many images.")
    ] = None,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Reconstruct averages of a trial's weights from the snapshots of its training; register or score them."""
    from soflow_platform.jobs.posthoc_ema import EmaRequest

    request = EmaRequest(trial, parse_lengths(length), step, out)
    ema_command(request, Places(address, storage, tracking), register, score)


def parse_lengths(text: str) -> tuple[float, ...]:
    """`0.05,0.1` -> (0.05, 0.1). Raises UserError where one is no number."""
    try:
        lengths = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        lengths = ()
    if not lengths:
        raise UserError(f"--length {text!r} is no list of numbers: give such as 0.05,0.1.")
    return lengths


def ema_command(request: EmaRequest, places: Places, register: str | None, score: int | None) -> None:
    """Write the weights, and say how closely each profile is met."""
    project = find_project(places.storage)
    require_writable(project)
    from soflow_platform.cli.terminal import console
    from soflow_platform.jobs.posthoc_ema import reconstruct, register_average

    quiet_libraries()
    if register is not None:
        from soflow_platform.config.gate import model_name

        try:
            model_name(register)
        except ValueError as error:
            raise UserError(f"--register {register!r}: {error}.") from None
    averages = reconstruct(request, project)
    table = plain_table("length", "step", "snapshots", "profile missed by", "weights")
    for average in averages:
        missed = f"{100 * average.residual:.2g} %"
        table.add_row(
            f"{average.length:g}", f"{average.step:,}", str(average.snapshots), missed, str(average.weights)
        )
    console().print(table)
    if register is not None:
        from soflow_platform.tracking.store import Tracking

        with stdout_to_stderr():
            tracking = Tracking.open(places.tracking or project.tracking_uri, register, project)
            versions = [register_average(average, register, tracking) for average in averages]
        for average, version in zip(averages, versions, strict=True):
            console().print(f"models:/{register}/{version} has length {average.length:g}", highlight=False)
    if score is not None:
        from soflow_platform.cli.evaluate import evaluate_command
        from soflow_platform.jobs.requests import EvaluateRequest

        for average in averages:
            console().print(f"length {average.length:g}:", highlight=False)
            evaluate_command(EvaluateRequest(str(average.weights), score), places, as_json=False)
