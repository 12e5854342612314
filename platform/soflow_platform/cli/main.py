"""The commands of soflowctl, and its exit codes."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import os
import signal
import sys
import warnings
from types import FrameType
from typing import Annotated, NoReturn

import typer

from soflow_core.failures import InputError, printable
from soflow_platform.cli import data
from soflow_platform.cli.averages import ema
from soflow_platform.cli.doctor import doctor
from soflow_platform.cli.export import export, import_checkpoint
from soflow_platform.cli.generate import generate
from soflow_platform.cli.help import help_command
from soflow_platform.cli.models import models
from soflow_platform.cli.process_end import end_process
from soflow_platform.cli.promote import promote
from soflow_platform.cli.report import report
from soflow_platform.cli.scoring_commands import compare, evaluate
from soflow_platform.cli.sweep_commands import attach, logs, plan, run, runs, status, stop, ui, validate
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


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback where a command fails.")] = False,
) -> None:
    """Train, compare, register and run one-step image generators."""
    if debug:
        os.environ["SOFLOW_DEBUG"] = "1"


app.command()(run)
app.command()(validate)
app.command()(plan)
app.command()(runs)
app.command()(status)
app.command()(logs)
app.command()(stop)
app.command()(attach)
app.command()(ui)
app.command()(doctor)
app.command()(report)
app.command()(promote)
app.command()(models)
app.command()(export)
app.command()(ema)
app.command("import")(import_checkpoint)
app.command()(generate)
app.command()(evaluate)
app.command()(compare)
app.command("help")(help_command)


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


def program() -> NoReturn:
    """Console entry point: `main`, and the end of the process."""
    code: object = None
    try:
        main()
    except SystemExit as end:
        code = end.code
    end_process(code)


def main() -> None:
    """A command, by the arguments of the process. One that fails prints one sentence on stderr; `_exit_code` has its exit code."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    if not faulthandler.is_enabled():
        # A crash in compiled code, also one while Python ends, then says what every thread was doing.
        with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
            faulthandler.enable()
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


SHOWN = 80
"""Characters of a path that a refusal shows."""
REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""What the operating system says of a file that the user may not use, or of a name that no file can have."""
NO_HOME = "Could not determine home directory."
"""What pathlib says of `~NAME/...` where there is no such user."""


def describe_refusal(error: Exception) -> str | None:
    """A sentence on a path that this machine does not take, wherever it was met; None for any other error."""
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
        name = str(error.filename)
        shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
        return (
            f"{shown} cannot be used: {error.strerror}; name another place, or have this one made accessible."
        )
    if isinstance(error, RuntimeError) and str(error) == NO_HOME:
        return "a path begins with ~NAME, and this machine has no user of that name: write the path in full."
    return None


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
    refusal = describe_refusal(error)
    if refusal is not None:
        refused = UserError(refusal)
        refused.__cause__ = error
        _report(refused, "error")
        return 2
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
    program()
