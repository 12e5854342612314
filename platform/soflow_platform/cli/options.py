"""Options and arguments that several soflowctl commands share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from soflow_platform.errors import UserError
from soflow_platform.storage.project import why_not_writable

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
        help="A sweep file, or the name of one that comes with soflow: digits, digits-guidance, cifar10, cifar10-unet, b4, b2, m2, "
        "l2, xl2, methods-digits, methods-cifar10 and methods-cifar10-latents; the last three also with -tuned.",
    ),
]
ProxyOption = Annotated[
    str | None,
    typer.Option(
        "--proxy",
        metavar="SWEEP",
        help="Take network, steps, batch and machines from this sweep file, such as b4: the same search at a smaller size.",
    ),
]
SamplerOption = Annotated[
    str | None,
    typer.Option(
        "--sampler",
        help="Sampler, for methods that have several: consistency, ode, euler, heun, ddim, ddpm, or one of a plugin.",
    ),
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        "--guidance",
        help="Guidance scale at sampling, for methods that have one or are trained on a range of scales.",
    ),
]
IntervalOption = Annotated[
    str | None,
    typer.Option(
        "--interval",
        metavar="FROM,TO",
        help="Times between which samples are guided, such as 0.2,0.7, for networks that are trained on intervals that vary.",
    ),
]
TimesOption = Annotated[
    str | None,
    typer.Option(
        "--times",
        metavar="TIMES",
        help="Times between 1 (noise) and 0 at which the steps end, such as 0.55 for two steps; default: even steps.",
    ),
]
GridOption = Annotated[
    str | None,
    typer.Option(
        "--grid",
        metavar="GRID",
        help="Time grid of the steps: uniform, power or shifted, with a value such as shifted:3; default: that of the training.",
    ),
]
MOST_IMAGES, MOST_STEPS, MOST_SEEDS = 10**8, 10_000, 1_000
"""What a command makes or scores at most: images, sampling steps of one (as in a sweep file), seeds."""
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


def parse_sampling(
    sampler: str | None,
    guidance: float | None,
    times: str | None,
    grid: str | None,
    steps: tuple[int, ...] | None,
    interval: str | None = None,
) -> tuple[dict[str, Any], tuple[int, ...] | None]:
    """Values of these options -> sampler settings, and numbers of steps, those of the times or None.

    Raises UserError where a time or an interval is no number, and where the times do not make the steps.
    """
    settings: dict[str, Any] = {"sampler": sampler, "sampling_scale": guidance, "sampling_grid": grid}
    if interval is not None:
        settings["sampling_interval"] = _parse_interval(interval)
    if times is not None:
        if grid is not None:
            raise UserError("--times and --grid both say where the steps end: leave one of them out.")
        try:
            parsed = [float(time) for time in times.split(",")]
        except ValueError:
            raise UserError(f"--times {times!r} names no times; give numbers such as 0.6,0.3.") from None
        settings["sampling_times"] = parsed
        needed = (len(parsed) + 1,)
        if steps not in (None, needed):
            raise UserError(f"--times {times} makes {needed[0]} steps: leave --steps out.")
        steps = needed
    return {name: value for name, value in settings.items() if value is not None}, steps


def refuse_together(given: Mapping[str, object], option: str) -> None:
    """Raises UserError where an option was given, one that is not None or False, that another one leaves without a meaning."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UserError(f"{name} has no meaning with {option}: leave one of them out.")


def check_seed(seed: int) -> None:
    """Raises UserError where a seed, or those that follow it, are not of 64 bits: others would make the same noise again."""
    if not -(2**63) <= seed < 2**63 - MOST_SEEDS:
        raise UserError(f"--seed {seed} is beyond 64 bits: give a smaller number.")


def require_writable_file(option: str, path: Path | None, suffix: str) -> None:
    """Raises UserError where the file of an option has another suffix or no folder, or cannot be written; None passes."""
    if path is None:
        return
    try:
        usable = path.suffix == suffix and path.absolute().parent.is_dir() and not path.is_dir()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}): name another file.") from None
    if not usable:
        raise UserError(f"{option} {path}: give a file FILE{suffix} in a folder that exists.")
    reason = why_not_writable(path.absolute().parent)
    if reason is not None:
        raise UserError(f"{option} {path} cannot be written ({reason}): name another file.")


def _parse_interval(text: str) -> tuple[float, float]:
    """`0.2,0.7` -> (0.2, 0.7). Raises UserError where these are not two numbers."""
    try:
        first, last = (float(time) for time in text.split(","))
    except ValueError:
        raise UserError(
            f"--interval {text!r} is no interval of times; give two numbers such as 0.2,0.7."
        ) from None
    return first, last


RECORDED = (
    "as recorded with its training; --steps, --sampler, --guidance, --interval, --times and --grid set others"
)


def sampling_text(steps: int, settings: Mapping[str, str]) -> str:
    """`2 steps, sampler ode, sampling_grid shifted:3`."""
    return ", ".join(
        [f"{steps} step{'s' * (steps > 1)}", *(f"{name} {value}" for name, value in settings.items())]
    )
