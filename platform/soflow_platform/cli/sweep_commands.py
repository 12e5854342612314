"""run, validate, plan, runs, status, logs, stop, attach and ui: the options of the commands about sweeps."""

from __future__ import annotations

from typing import Annotated

import typer

from soflow_platform.cli.options import (
    AddressOption,
    NameArgument,
    ProxyOption,
    SetOption,
    StorageOption,
    SweepArgument,
    refuse_together,
)
from soflow_platform.errors import UserError


def run(
    sweep: SweepArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and stop; nothing is created.")
    ] = False,
    overrides: SetOption = None,
    proxy: ProxyOption = None,
    address: AddressOption = None,
    storage: StorageOption = None,
    again: Annotated[
        bool, typer.Option("--again", help="Run a sweep anew that is finished or trained by other code.")
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on with a sweep that other code has trained, and mark its run.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Try trials again that failed: not finite, out of memory, an exception."
        ),
    ] = False,
    detach: Annotated[
        bool,
        typer.Option(
            "--detach",
            help="With --address: let the command run on the cluster; attach, status and stop find it.",
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print the result alone, no progress.")
    ] = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Start without trying a step of each trial on the CPU first.")
    ] = False,
    no_register: Annotated[
        bool,
        typer.Option("--no-register", help="Leave the model registry as it is (registry.enabled=false)."),
    ] = False,
    local: Annotated[
        bool,
        typer.Option(
            "--local", help="Train one trial in this process, without Ray, for a debugger; nothing is kept."
        ),
    ] = False,
    trial: Annotated[
        str | None,
        typer.Option("--trial", metavar="NAME", help="With --local: the trial to train, not the first."),
    ] = None,
) -> None:
    """Run a sweep: every trial trained and scored, the best one registered.

    The same command goes on where an interrupted sweep stopped.
    """
    from soflow_platform.cli.run import RunOptions, run_command
    from soflow_platform.cli.run_local import run_local_command

    if local:
        others = {
            "--dry-run": dry_run,
            "--again": again,
            "--keep": keep,
            "--retry-failed": retry_failed,
            "--address": address,
            "--detach": detach,
            "--quiet": quiet,
            "--proxy": proxy,
        }
        refuse_together(others, "--local")
        run_local_command(sweep, tuple(overrides or ()), trial, storage)
        return
    if trial is not None:
        raise UserError("--trial chooses the trial of --local: pass both, or leave it out.")
    if again and keep:
        raise UserError("--again trains anew and --keep goes on with what is there: pass one of them.")
    if detach and address is None:
        raise UserError("--detach needs a cluster to run on: pass --address HEAD:6379.")
    options = RunOptions(dry_run, again, keep, quiet, not no_check, detach, retry_failed, proxy)
    settings = (*(overrides or ()), *(["registry.enabled=false"] if no_register else []))
    run_command(sweep, settings, address, storage, options)


def validate(sweep: SweepArgument, overrides: SetOption = None, proxy: ProxyOption = None) -> None:
    """Check a sweep file and each of its trials, without starting anything; names what departs from the paper's recipe."""
    from soflow_platform.cli.validate import validate_command

    validate_command(sweep, tuple(overrides or ()), proxy)


def plan(
    sweep: SweepArgument,
    overrides: SetOption = None,
    proxy: ProxyOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="GPU to plan for: a100, h100 (default), h200, b200 or l40s."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the cluster; default is what one trial asks for.")
    ] = None,
    utilization: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the GPU's peak that a step reaches.")
    ] = 0.4,
    price: Annotated[
        float | None,
        typer.Option(min=0, metavar="AMOUNT", help="Of one GPU for an hour; default is a round number."),
    ] = None,
    currency: Annotated[str, typer.Option(help="Of the price.")] = "USD",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a sweep computes, keeps, sends and costs: FLOPs, memory, bytes, GPU-hours, days and money. Starts nothing."""
    from soflow_platform.cli.plan import plan_command
    from soflow_platform.cli.sweep_file import print_proxy, read
    from soflow_platform.tuning.plan_assumptions import USUAL_GPU, Assumptions

    assumptions = Assumptions(gpu or USUAL_GPU, gpus, utilization, price, currency)
    checked = read(sweep, tuple(overrides or ()), proxy)
    print_proxy(checked, proxy)
    plan_command(checked, assumptions, timed=gpu is not None, as_json=as_json)


def runs(
    sweep: Annotated[
        str | None, typer.Argument(metavar="[SWEEP]", help="Id of one sweep, to see its trials.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """List sweeps, and the trials of each with their numbers."""
    from soflow_platform.cli.runs import runs_command

    runs_command(sweep, storage)


def status(
    name: Annotated[str | None, NameArgument] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")] = False,
    storage: StorageOption = None,
) -> None:
    """Show the status of trials: of one sweep or trial, else of every running sweep, else of the newest."""
    from soflow_platform.cli.status import status_command

    status_command(name, as_json, storage)


def logs(
    name: Annotated[str, NameArgument],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the sweep runs.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines to begin with.")] = 20,
    storage: StorageOption = None,
) -> None:
    """Print the log of a trial, or the logs of all trials of a sweep in the order of time."""
    from soflow_platform.cli.status import logs_command

    logs_command(name, follow, lines, storage)


def stop(
    name: Annotated[str, NameArgument],
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="How long to wait for the end; 0 returns at once.")
    ] = 120,
    storage: StorageOption = None,
) -> None:
    """Stop a running sweep or trial after its present step, with a checkpoint; `soflowctl run` resumes it."""
    from soflow_platform.cli.status import stop_command

    stop_command(name, wait, storage)


def attach(name: Annotated[str, NameArgument], storage: StorageOption = None) -> None:
    """Print what the command of a sweep prints that was submitted with `run --detach`, until it ends, with its exit code."""
    from soflow_platform.cli.attach import attach_command

    raise typer.Exit(attach_command(name, storage))


def ui(
    storage: StorageOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on loopback; 0 takes a free one.")] = 5000,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Show runs, curves, sample grids and the model registry in MLflow, on this machine alone."""
    from soflow_platform.cli.ui import ui_command

    ui_command(storage, port, browser)
