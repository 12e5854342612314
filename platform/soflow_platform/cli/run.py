"""soflowctl run and validate."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from soflow_platform.cli.display import SweepDisplay, show_result
from soflow_platform.cli.terminal import console, plain_table
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.presets import sweeps_folder
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder, find_project, require_writable
from soflow_platform.training.stop_request import request_stop
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.record import (
    SweepRecord,
    load_record,
    lock_sweep,
    new_or_resumed_record,
    sweep_id,
)
from soflow_platform.tuning.search_space import Trial, trials

T = TypeVar("T")

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes."""


def find_sweep(name: str) -> Path:
    """A sweep file by path, or by the name of one that comes with the package."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = sweeps_folder() / f"{name}.yaml"
    if packaged.is_file():
        return packaged
    known = ", ".join(sorted(p.stem for p in sweeps_folder().glob("*.yaml")))
    raise UserError(
        f"there is no sweep file {name}; give a path, or one of those that come with soflow: {known}."
    )


def read(name: str, overrides: tuple[str, ...]) -> tuple[Path, Experiment, list[Trial]]:
    """A sweep file, checked, with its trials."""
    path = find_sweep(name)
    experiment, document = read_experiment(path, overrides)
    return path, experiment, trials(document, experiment)


def validate_command(name: str, overrides: tuple[str, ...]) -> None:
    """Print that a file is sound, and what it stands for."""
    path, experiment, points = read(name, overrides)
    _check_networks(points)
    print(
        f"{path} is valid: {len(points)} trial(s) of {_methods(points)}, {_steps(points)} steps "
        f"of {experiment.training.batch} samples, compared by {experiment.search.metric} ({experiment.mode})."
    )


def _methods(points: list[Trial]) -> str:
    return ", ".join(dict.fromkeys(trial.experiment.objective.method for trial in points))


def _steps(points: list[Trial]) -> str:
    """`600`, or `492 to 900`."""
    steps = [trial.experiment.training.steps for trial in points]
    return f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,} to {max(steps):,}"


def _check_networks(points: list[Trial]) -> None:
    """Raises UserError where a trial's network cannot take the shape that the file names."""
    from soflow_platform.training.dataset import expected
    from soflow_platform.training.model import describe_network

    for trial in points:
        data = expected(trial.experiment)
        if data is not None:
            describe_network(trial.experiment, data)


def run_command(
    name: str,
    overrides: tuple[str, ...],
    address: str | None,
    storage_option: str | None,
    dry_run: bool,
    again: bool,
) -> None:
    """Run a sweep, or print its plan."""
    path, experiment, points = read(name, overrides)
    _check_networks(points)
    storage = find_project(storage_option)
    screen = console()
    if dry_run:
        _print_plan(screen, experiment, points, storage.root)
        return
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.training.dataset import check_data
    from soflow_platform.tuning.sweep import run_sweep

    check_data(experiment)
    require_writable(storage)
    require_answer(address)
    sweep = sweep_id(storage, experiment, again)
    record = load_record(storage, sweep)
    if record is not None and record.finished:
        screen.print(f"sweep {sweep} is finished; --again runs it anew.")
        show_result(screen, record, storage)
        return
    if record is not None:
        _require_checkpoints(storage, record, experiment)
    record = new_or_resumed_record(record, sweep, str(path), experiment, points)
    display = SweepDisplay(screen, experiment, points)
    grace = experiment.training.grace_seconds
    with _graceful_shutdown(storage, sweep, display, grace), lock_sweep(storage, sweep):
        outcomes = _retry_lost_ray(
            lambda: run_sweep(record, experiment, points, storage, address, display),
            experiment.resources.max_failures if address is None else 0,
            display,
        )
    show_result(screen, record, storage, outcomes)
    failed = [o for o in outcomes if o.status.state is TrialState.FAILED]
    if failed:
        raise JobError(
            f"{len(failed)} of {len(outcomes)} trials failed ({failed[0].name}: {failed[0].status.failure}); "
            "the same command tries them again."
        )


def _retry_lost_ray(run: Callable[[], T], failures: int, display: SweepDisplay) -> T:
    """The result of `run`, which is started again where the Ray of this command has died, up to so many times."""
    from soflow_platform.cluster.connection import RayLost

    try:
        return run()
    except RayLost as error:
        if not failures:
            raise
        display.say(f"{error} Starting Ray again.")
    return _retry_lost_ray(run, failures - 1, display)


def _require_checkpoints(storage: ProjectFolder, record: SweepRecord, experiment: Experiment) -> None:
    """Raises UserError where trials have checkpoints in the place that was set before and none in the one that is set now."""
    before, now = record.experiment["training"].get("checkpoints"), experiment.training.checkpoints
    if before == now:
        return
    for trial in record.trials:
        left, chosen = (
            CheckpointStore.of_trial(storage, record.id, trial["name"], base) for base in (before, now)
        )
        if left.published() and not chosen.published():
            raise UserError(
                f"the checkpoints of sweep {record.id} are in {left.root} and not in {chosen.root}: move them there, or leave "
                "training.checkpoints as it was."
            )


@contextlib.contextmanager
def _graceful_shutdown(
    storage: ProjectFolder, sweep: str, display: SweepDisplay, grace: float
) -> Iterator[None]:
    """SIGTERM, SIGHUP and Ctrl-C ask the trials to save and stop; the second one, or `grace` seconds gone by, ends the block at once.

    Either way what is open is closed, and the exit code says why: 143, or 130 for Ctrl-C.
    """
    code = 0

    def end(*_: Any) -> None:
        raise SystemExit(code)

    def ask(number: int, _: Any) -> None:
        nonlocal code
        if code or not display.training:
            code = code or (INTERRUPTED if number == signal.SIGINT else TERMINATED)
            print("ended at once: run the same command to go on.", file=sys.stderr)
            end()
        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if number == signal.SIGHUP:
            _leave_terminal()
        print("asked to stop: trials finish their step and save; once more ends at once.", file=sys.stderr)
        request_stop(storage, sweep)
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, grace)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            # Under nohup a hang-up is to be ignored.
            signal.signal(number, ask)
    try:
        yield
    except (SystemExit, Stopped) as error:
        # An exit inside one of Ray's calls comes out of it with Ray's own code.
        if code:
            if isinstance(error, Stopped):
                print(f"soflowctl: stopped: {error}", file=sys.stderr)
            raise SystemExit(code) from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _leave_terminal() -> None:
    """Write nowhere what would go to a terminal that is gone: writing there fails."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_plan(screen: Console, experiment: Experiment, points: list[Trial], root: Path) -> None:
    from soflow_platform.training.dataset import check_data, expected
    from soflow_platform.training.flops import cost, request
    from soflow_platform.training.model import describe_network

    screen.print(f"[bold]{experiment.name}[/bold]: {experiment.description}")
    table = plain_table("trial", "steps", "parameters", "GMAC/forward", "passes/sample", "PFLOP")
    for trial in points:
        data = expected(trial.experiment)
        if data is None:
            table.add_row(trial.name, f"{trial.experiment.training.steps:,}", "-", "-", "-", "-")
            continue
        spent = cost(trial.experiment, describe_network(trial.experiment, data))
        table.add_row(
            trial.name,
            f"{trial.experiment.training.steps:,}",
            f"{spent.parameters / 1e6:.1f} M",
            f"{spent.forward_gmac:.4g}",
            f"{spent.evaluations_per_sample:.4g}",
            f"{spent.total_petaflops:,.4g}",
        )
        state = spent.state_gigabytes
    screen.print(table)
    screen.print(
        f"{len(points)} trials of {_steps(points)} steps, {experiment.training.batch} samples in each step"
    )
    screen.print(f"compared by {experiment.search.metric} ({experiment.mode})")
    screen.print(f"asks Ray for {request(experiment)}")
    if data is not None:
        screen.print(
            f"{state:.3g} GB of weights, gradients, optimizer and EMA state in each worker, activations besides"
        )
    screen.print(f"storage {root}")
    try:
        screen.print(f"data {check_data(experiment)}")
    except UserError as error:
        screen.print(f"before it can run: {error}")
