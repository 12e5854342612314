"""The commands of soflowctl with their options, and its exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from enum import Enum
from types import FrameType
from typing import Annotated

import typer

from soflow_core.failures import InputError, printable
from soflow_platform.cli import data
from soflow_platform.cli.averages import ema
from soflow_platform.cli.doctor import doctor
from soflow_platform.cli.export import export, import_checkpoint
from soflow_platform.cli.generate import generate
from soflow_platform.cli.models import models
from soflow_platform.cli.options import (
    AddressOption,
    GuidanceOption,
    NameArgument,
    Places,
    ProxyOption,
    SamplerOption,
    SetOption,
    StorageOption,
    SweepArgument,
    TimesOption,
    TrackingOption,
    parse_sampling,
)
from soflow_platform.cli.promote import promote
from soflow_platform.cli.report import report
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.tracking.outages import describe_outage

UsageError: type[BaseException] = typer.BadParameter.__mro__[1]
"""Raised for a wrong option. Taken from typer, because some versions of it bring their own click."""

app = typer.Typer(
    name="soflowctl",
    help="Train, compare, register and run one-step image generators.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.add_typer(data.app, name="data")


class LabelMode(str, Enum):
    """How the labels of scored images are chosen."""

    uniform = "uniform"
    balanced = "balanced"


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where a command fails.")] = False,
) -> None:
    """Train, compare, register and run one-step image generators."""
    if debug:
        os.environ["SOFLOW_DEBUG"] = "1"


@app.command()
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
            "--address": address,
            "--quiet": quiet,
            "--proxy": proxy,
        }
        _refuse(others, "--local")
        run_local_command(sweep, tuple(overrides or ()), trial, storage)
        return
    if trial is not None:
        raise UserError("--trial chooses the trial of --local: pass both, or leave it out.")
    if again and keep:
        raise UserError("--again trains anew and --keep goes on with what is there: pass one of them.")
    options = RunOptions(dry_run, again, keep, quiet, not no_check, proxy)
    settings = (*(overrides or ()), *(["registry.enabled=false"] if no_register else []))
    run_command(sweep, settings, address, storage, options)


def _refuse(given: Mapping[str, object], option: str) -> None:
    """Raises UserError where an option was given that another one leaves without a meaning."""
    for name, value in given.items():
        if value:
            raise UserError(f"{name} has no meaning with {option}: leave one of them out.")


@app.command()
def validate(sweep: SweepArgument, overrides: SetOption = None, proxy: ProxyOption = None) -> None:
    """Check a sweep file and each of its trials, without starting anything; names what departs from the paper's recipe."""
    from soflow_platform.cli.validate import validate_command

    validate_command(sweep, tuple(overrides or ()), proxy)


@app.command()
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
    from soflow_platform.tuning.plan import USUAL_GPU, Assumptions

    assumptions = Assumptions(gpu or USUAL_GPU, gpus, utilization, price, currency)
    checked = read(sweep, tuple(overrides or ()), proxy)
    print_proxy(checked, proxy)
    plan_command(checked, assumptions, timed=gpu is not None, as_json=as_json)


@app.command()
def runs(
    sweep: Annotated[
        str | None, typer.Argument(metavar="[SWEEP]", help="Id of one sweep, to see its trials.")
    ] = None,
    storage: StorageOption = None,
) -> None:
    """List sweeps, and the trials of each with their numbers."""
    from soflow_platform.cli.runs import runs_command

    runs_command(sweep, storage)


@app.command()
def status(
    name: Annotated[str | None, NameArgument] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trials as JSON.")] = False,
    storage: StorageOption = None,
) -> None:
    """Show the status of trials: of one sweep or trial, else of every running sweep, else of the newest."""
    from soflow_platform.cli.status import status_command

    status_command(name, as_json, storage)


@app.command()
def logs(
    name: Annotated[str, NameArgument],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on while the sweep runs.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines to begin with.")] = 20,
    storage: StorageOption = None,
) -> None:
    """Print the log of a trial, or the logs of all trials of a sweep in the order of time."""
    from soflow_platform.cli.status import logs_command

    logs_command(name, follow, lines, storage)


@app.command()
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


@app.command()
def ui(
    storage: StorageOption = None,
    port: Annotated[int, typer.Option(help="Port on loopback; 0 takes a free one.")] = 5000,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = True,
) -> None:
    """Show runs, curves, sample grids and the model registry in MLflow, on this machine alone."""
    from soflow_platform.cli.ui import ui_command

    ui_command(storage, port, browser)


app.command()(doctor)
app.command()(report)
app.command()(promote)
app.command()(models)
app.command()(export)
app.command()(ema)
app.command("import")(import_checkpoint)
app.command()(generate)


@app.command()
def evaluate(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RUN|CHECKPOINT|FOLDER|NPZ",
            help="models:/NAME@ALIAS, a sweep, SWEEP/TRIAL or MLflow run, a checkpoint folder or .safetensors file, "
            "a folder of images, an .npz file of samples, or a shard set.",
        ),
    ],
    metrics: Annotated[
        str | None,
        typer.Option(help="fid, sfid, is, kid, precision, recall, fd, label_agreement; several with commas."),
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of images; default 50,000 of a network, or all of a folder or file."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Numbers of sampling steps, each scored, such as 1,2,4; default 1, or those of --times."
        ),
    ] = None,
    labels: Annotated[
        LabelMode, typer.Option(help="Labels drawn for each image, or every class in turn.")
    ] = LabelMode.uniform,
    seed: Annotated[int, typer.Option(help="Image i is a function of the seed, i and its label.")] = 0,
    features: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="inception, dinov2, clip, digits-classifier, pooled or file:PATH; default inception, for digits their classifier.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Real images: a shard set, a folder, or ADM's .npz; default: the data of the training.",
        ),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option(metavar="ID|PATH", help="Decodes latents; default is the one they were made with."),
    ] = None,
    sampler: SamplerOption = None,
    guidance: GuidanceOption = None,
    times: TimesOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Score the images of a network, or images in a folder or file: FID and other metrics, with the settings that decide them.

    The same command goes on where an interrupted one stopped.
    """
    from soflow_platform.cli.evaluate import evaluate_command, parse_list, parse_steps
    from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest, SamplingRequest

    settings, numbers = parse_sampling(
        sampler, guidance, times, None if steps is None else parse_steps(steps)
    )
    request = EvaluateRequest(
        target=target,
        num=num,
        sampling=SamplingRequest(
            steps=numbers,
            labels=labels.value,
            seed=seed,
            settings=settings,
        ),
        protocol=ProtocolRequest(
            metrics=parse_list("--metrics", metrics) if metrics is not None else (),
            features=features,
            reference=reference,
            autoencoder=autoencoder,
        ),
    )
    evaluate_command(request, Places(address, storage, tracking), as_json)


@app.command()
def compare(
    sweep: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="Id or name of a sweep that ran, or its file, whose `comparison` section is then used.",
        ),
    ],
    overrides: SetOption = None,
    costs: Annotated[
        bool,
        typer.Option("--costs/--no-costs", help="Measure seconds and memory of each method on this machine."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    address: AddressOption = None,
    storage: StorageOption = None,
    tracking: TrackingOption = None,
) -> None:
    """Compare the methods of a sweep: distance at each number of function evaluations, cost of a step, time of an image."""
    from soflow_platform.cli.compare import compare_command

    places = Places(address, storage, tracking)
    compare_command(sweep, tuple(overrides or ()), places, costs, as_json)


@app.command()
def version() -> None:
    """Print the installed version."""
    from soflow_platform import version as installed

    typer.echo(f"soflow {installed()}")


TERMINATING = (signal.SIGTERM, signal.SIGHUP)
_terminated: list[int] = []
"""The signal that ended the command, where one did."""


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave every block of the command, so that it closes what is open, with exit code 143."""
    del frame
    _terminated.append(number)
    # What is being closed is not interrupted by another one.
    for each in TERMINATING:
        signal.signal(each, signal.SIG_IGN)
    with contextlib.suppress(OSError, RuntimeError):
        # The terminal may be gone, and the signal may have come in the middle of another print.
        print("terminated: run the same command to go on.", file=sys.stderr)
    raise SystemExit(143)


INTERRUPTED = "interrupted: run the same command to go on."


def main() -> None:
    """Console entry point. A command that fails prints one sentence on stderr; `_exit_code` has its exit code."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Torch's own forward-mode derivatives use torch.jit.script, which warns when the first derivative is taken.
    warnings.filterwarnings("ignore", message=".torch.jit.script. is deprecated", category=FutureWarning)
    for number in TERMINATING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            # Under nohup a hang-up stays ignored.
            signal.signal(number, _terminate)
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(_exit_code(error))
    except SystemExit:
        if _terminated:
            # An exit inside one of Ray's calls comes out of it with Ray's own code.
            sys.exit(143)
        raise
    if code == 130:
        # Typer has made an exit code of Ctrl-C.
        print(INTERRUPTED, file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _exit_code(error: Exception) -> int:
    """Print a failure and return its exit code: 2 for input that cannot be used, 143 for a requested stop, else 1."""
    if isinstance(error, UsageError):
        _report(error, "usage")
        return 2
    if isinstance(error, Stopped):
        _report(error, "stopped")
        return 143
    outage = describe_outage(error)
    if outage is not None:
        _report(JobError(f"{outage}; the same command goes on once that is mended."), "failed")
        return 1
    if isinstance(error, InputError):
        _report(error, "error")
        return 2
    if isinstance(error, JobError):
        _report(error, "failed")
        return 1
    _report(error, "internal error")
    print("This is a bug; `soflowctl --debug ...` shows where.", file=sys.stderr)
    return 1


def _report(error: BaseException, kind: str) -> None:
    if os.environ.get("SOFLOW_DEBUG"):
        import traceback

        traceback.print_exception(error)
    message = getattr(error, "format_message", None)
    text = message() if message else str(error) or type(error).__name__
    print(f"soflowctl: {kind}: {printable(text, newlines=True)}", file=sys.stderr)


if __name__ == "__main__":
    main()
