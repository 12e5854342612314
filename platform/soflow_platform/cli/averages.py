"""soflowctl ema: averages of a trial's weights whose length is chosen after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soflow_platform.cli.options import (
    MOST_IMAGES,
    MOST_SEEDS,
    AddressOption,
    Places,
    StorageOption,
    TrackingOption,
    require_writable_file,
)
from soflow_platform.cli.terminal import console, plain_table, quiet_libraries, stdout_to_stderr
from soflow_platform.errors import UserError
from soflow_platform.storage.project import find_project, require_writable, require_writable_folder

if TYPE_CHECKING:
    from soflow_platform.jobs.posthoc_ema import Average, EmaRequest


@dataclass(frozen=True)
class ScoreOptions:
    """How averages are scored."""

    images: int
    steps: tuple[int, ...] = (1, 2)
    seeds: int = 1
    plot: Path | None = None
    """PNG with a panel for each metric against length, a line for each number of steps."""


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
        int | None,
        typer.Option(
            metavar="IMAGES",
            min=2,
            max=MOST_IMAGES,
            help="Score each with as many images, and print one table.",
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(help="With --score: numbers of sampling steps, by default 1,2.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_SEEDS, help="With --score: seeds of the images, for mean and spread."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="With --score: plot of every metric against the length."),
    ] = None,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Reconstruct averages of a trial's weights from the snapshots of its training; register or score them."""
    from soflow_platform.cli.evaluate import parse_steps
    from soflow_platform.jobs.posthoc_ema import EmaRequest

    scoring = None
    if score is not None:
        require_writable_file("--plot", plot, ".png")
        usual = ScoreOptions(score)
        numbers = usual.steps if steps is None else parse_steps(steps)
        scoring = ScoreOptions(score, numbers, seeds or usual.seeds, plot)
    else:
        for option, value in (("--steps", steps), ("--seeds", seeds), ("--plot", plot)):
            if value is not None:
                raise UserError(f"{option} is of scores: give --score IMAGES too.")
    request = EmaRequest(trial, parse_lengths(length), step, out)
    ema_command(request, Places(address, storage, tracking), register, scoring)


def parse_lengths(text: str) -> tuple[float, ...]:
    """`0.05,0.1` -> (0.05, 0.1). Raises UserError where one is no number."""
    try:
        lengths = tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        lengths = ()
    if not lengths:
        raise UserError(f"--length {text!r} is no list of numbers: give such as 0.05,0.1.")
    return lengths


def ema_command(
    request: EmaRequest, places: Places, register: str | None, scoring: ScoreOptions | None
) -> None:
    """Write the weights, and say how closely each profile is met."""
    project = find_project(places.storage)
    require_writable(project)
    if request.out is not None:
        require_writable_folder("--out", request.out)
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
    if scoring is not None:
        _score(averages, scoring, places)


def _score(averages: Sequence[Average], scoring: ScoreOptions, places: Places) -> None:
    """Score the averages, print one table of all, and write the plot."""
    from soflow_pipelines.storage.files import write_bytes
    from soflow_platform.cli.evaluate import print_scores, scoring_services
    from soflow_platform.jobs.posthoc_ema import score_averages
    from soflow_platform.jobs.requests import SamplingRequest
    from soflow_platform.jobs.score_summary import plot, summaries

    sampling = SamplingRequest(steps=scoring.steps, seeds=scoring.seeds)
    with scoring_services(places) as services:
        scores = score_averages(averages, scoring.images, sampling, services)
    print_scores(scores)
    if scoring.plot is not None:
        write_bytes(scoring.plot, plot(summaries(scores)))
        console().print(f"saved  {scoring.plot}", highlight=False, soft_wrap=True)
