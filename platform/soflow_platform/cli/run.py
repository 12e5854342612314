"""soflowctl run: check a sweep file, print its plan, run its trials."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from soflow_platform.cli.options import Places
from soflow_platform.cli.sweep_file import later_trials, print_proxy, read, steps_of
from soflow_platform.cli.terminal import console, plain_table, styled
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.code_digest import describe_difference, running_code
from soflow_platform.storage.project import ProjectFolder, find_project, require_writable
from soflow_platform.training.stop_request import request_stop
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.record import (
    SweepRecord,
    load_record,
    lock_sweep,
    new_or_resumed_record,
    sweep_id,
    with_recorded_names,
)
from soflow_platform.tuning.recorded import recorded_trials
from soflow_platform.tuning.search_space import Trial

if TYPE_CHECKING:
    from rich.console import Console

    from soflow_pipelines.preparation.builtin import Expected
    from soflow_platform.cli.display import SweepDisplay
    from soflow_platform.training.flops import Cost
    from soflow_platform.training.start import Start

T = TypeVar("T")


@dataclass(frozen=True)
class RunOptions:
    """What `soflowctl run` is to do beside running the sweep."""

    dry_run: bool = False
    """Print the plan alone."""
    again: bool = False
    """Run a finished sweep, or one that other code has trained, anew."""
    keep: bool = False
    """Go on with a sweep that other code has trained."""
    quiet: bool = False
    """Print nothing before the result."""
    check: bool = True
    """Try a step of each trial first."""
    proxy: str | None = None
    """Sweep file at whose size and length the sweep is run."""


INTERRUPTED, TERMINATED = 130, 143
"""Exit codes."""
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def run_command(
    name: str,
    overrides: tuple[str, ...],
    address: str | None,
    storage_option: str | None,
    options: RunOptions,
) -> None:
    """Run a sweep, or print its plan."""
    sweep_file = read(name, overrides, options.proxy)
    print_proxy(sweep_file, options.proxy)
    path, experiment, planned = sweep_file.path, sweep_file.experiment, sweep_file.trials
    storage = find_project(storage_option)
    screen = console()
    if options.dry_run:
        _print_plan(screen, experiment, planned, storage.root)
        return
    from soflow_platform.cli.display import SweepDisplay, show_result
    from soflow_platform.training.dataset import check_data

    data = check_data(experiment)
    require_writable(storage)
    sweep = sweep_id(storage, experiment, options.again)
    existing = load_record(storage, sweep)
    if existing is not None:
        planned = with_recorded_names(planned, existing)
        planned += recorded_trials(sweep_file.document, experiment, existing, planned)
        _check_code(storage, existing, options.keep, screen)
    if existing is not None and existing.finished:
        screen.print(f"sweep {sweep} is finished; --again runs it anew.")
        show_result(screen, existing, storage)
        _score_best(screen, existing, experiment, Places(address, storage_option, existing.tracking_uri))
        return
    starts = find_starts(planned, data, storage, experiment, existing)
    if options.check:
        _check_first_steps(planned, data)
    if not options.quiet:
        _print_short_plan(screen, experiment, planned, data)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.training.start import start_key
    from soflow_platform.tuning.sweep import SweepContext, run_sweep

    require_answer(address)
    if existing is not None:
        _require_checkpoints(storage, existing, experiment)
    record = new_or_resumed_record(existing, sweep, str(path), experiment, planned)
    for trial in planned:
        if trial.name in starts:
            record.starts[start_key(trial.experiment)] = starts[trial.name].as_dict()
    display = SweepDisplay(screen, experiment, planned, options.quiet)
    context = SweepContext(record, experiment, planned, storage, display, sweep_file.document)
    shutdown = GracefulShutdown(storage, sweep, display, experiment.training.grace_seconds)
    with shutdown, lock_sweep(storage, sweep):
        outcomes = restart_lost_ray(
            lambda: run_sweep(context, address),
            experiment.resources.max_failures if address is None else 0,
            display.say,
        )
    show_result(screen, record, storage, outcomes)
    failed = [o for o in outcomes if o.status.state is TrialState.FAILED]
    if failed:
        raise JobError(
            f"{len(failed)} of {len(outcomes)} trials failed ({failed[0].name}: {failed[0].status.failure}); "
            "the same command tries them again."
        )
    _score_best(screen, record, experiment, Places(address, storage_option, record.tracking_uri))


def _score_best(screen: Console, record: SweepRecord, experiment: Experiment, places: Places) -> None:
    """Score the best trial with `evaluation.final_samples`; scores that were computed before are read."""
    evaluation, best = experiment.evaluation, record.best
    if evaluation.final_samples is None or best is None:
        return
    from soflow_core.nfe import steps_for
    from soflow_platform.cli.evaluate import evaluate_command
    from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest, SamplingRequest

    # The trial may be none of the file's: search algorithms and finals add some from results.
    trial = Experiment(**record.recipe(best.trial))
    steps = tuple(steps_for(trial.sampled_objective, nfe, trial.data.conditional) for nfe in evaluation.nfe)
    screen.print(f"scoring {best.trial} with {evaluation.final_samples:,} samples")
    request = EvaluateRequest(
        target=f"{record.id}/{best.trial}",
        num=evaluation.final_samples,
        # Other noise than that of the scores which it was chosen by.
        sampling=SamplingRequest(steps, evaluation.labels, evaluation.seed + 1),
        protocol=ProtocolRequest(
            features=evaluation.features, reference=evaluation.reference, autoencoder=evaluation.autoencoder
        ),
    )
    evaluate_command(request, places, as_json=False)


def _check_code(storage: ProjectFolder, record: SweepRecord, keep: bool, screen: Console) -> None:
    """Raises UserError where other code has trained the sweep, unless that is to be kept, which is then printed."""
    code = running_code()
    files = record.other_files(storage, code)
    if not files:
        return
    if not any(record.checkpoints(storage, trial.name).published() for trial in record.trials):
        # Nothing that it trained is left.
        record.code.clear()
        return
    difference = f"sweep {record.id} was trained by other code than this: {describe_difference(files)}"
    if not keep:
        raise UserError(
            f"{difference}. --again trains it anew, --keep goes on with what is there and marks its run."
        )
    screen.print(f"{difference}; what it has trained is kept.")


def _check_first_steps(planned: list[Trial], data: Expected) -> None:
    """Raises StepCheckError, after its traceback is printed, where a trial's code raises; UserError where its settings do not fit."""
    from soflow_platform.training.step_check import StepCheckError, check_first_steps

    try:
        check_first_steps(((trial.name, trial.experiment) for trial in planned), data)
    except StepCheckError as error:
        print(error.traceback, end="", file=sys.stderr)
        raise


def find_starts(
    planned: list[Trial],
    data: Expected,
    storage: ProjectFolder,
    experiment: Experiment,
    record: SweepRecord | None = None,
) -> dict[str, Start]:
    """The weights that trials start from, by trial. Raises UserError where there are none, or where they do not fit."""
    starting = [
        (trial.name, trial.experiment)
        for trial in planned
        if trial.experiment.training.start_from is not None
    ]
    if not starting:
        return {}
    from soflow_platform.jobs.start_from import resolve_starts

    known = {} if record is None else record.starts
    return resolve_starts(starting, data, storage, experiment.tracking.uri or storage.tracking_uri, known)


def restart_lost_ray(run: Callable[[], T], restarts: int, say: Callable[[str], None]) -> T:
    """The result of `run`, which is started again up to `restarts` times where the Ray of this command has died."""
    from soflow_platform.cluster.connection import RayLost

    while restarts > 0:
        restarts -= 1
        try:
            return run()
        except RayLost as error:
            say(f"{error} Starting Ray again.")
    return run()


def _require_checkpoints(storage: ProjectFolder, record: SweepRecord, experiment: Experiment) -> None:
    """Raises UserError where trials have checkpoints in the place that was set before and none in the one that is set now."""
    before, now = record.experiment["training"].get("checkpoints"), experiment.training.checkpoints
    if before == now:
        return
    for trial in record.trials:
        left, chosen = (
            CheckpointStore.of_trial(storage, record.id, trial.name, base) for base in (before, now)
        )
        if left.published() and not chosen.published():
            raise UserError(
                f"the checkpoints of sweep {record.id} are in {left.root} and not in {chosen.root}: move them there, or leave "
                "training.checkpoints as it was."
            )


class GracefulShutdown:
    """While a block runs, SIGTERM, SIGHUP and Ctrl-C ask the trials to save and stop.

    A second signal, or `grace` seconds gone by, ends the block at once. Either way what is open is closed, and the exit code says why:
    143, or 130 for Ctrl-C. The signal handlers that were installed before are restored when the block ends.
    """

    def __init__(self, storage: ProjectFolder, sweep: str, display: SweepDisplay, grace: float) -> None:
        self._storage, self._sweep, self._display, self._grace = storage, sweep, display, grace
        self._handlers: dict[int, Any] = {}
        self.requested: int | None = None
        """The first signal that came."""

    @property
    def exit_code(self) -> int:
        """0 where no signal came."""
        if self.requested is None:
            return 0
        return INTERRUPTED if self.requested == signal.SIGINT else TERMINATED

    def __enter__(self) -> GracefulShutdown:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                # Under nohup a hang-up stays ignored.
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._exit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.exit_code and isinstance(error, (SystemExit, Stopped)):
            if isinstance(error, Stopped):
                print(f"soflowctl: stopped: {error}", file=sys.stderr)
            # An exit inside one of Ray's calls comes out of it with Ray's own code.
            raise SystemExit(self.exit_code) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = self.requested is None, self.requested or number
        if not first or not self._display.training:
            print("ended at once: run the same command to go on.", file=sys.stderr)
            self._exit(number, frame)
        if number == signal.SIGHUP:
            _leave_terminal()
        print("asked to stop: trials finish their step and save; once more ends at once.", file=sys.stderr)
        request_stop(self._storage, self._sweep)
        signal.setitimer(signal.ITIMER_REAL, self._grace)

    def _exit(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        raise SystemExit(self.exit_code)


def _leave_terminal() -> None:
    """Send what would go to a terminal that is gone to the null device: writing there fails."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _print_short_plan(
    screen: Console, experiment: Experiment, planned: list[Trial], data: Expected | None = None
) -> None:
    from soflow_platform.cli.plan import short_plan
    from soflow_platform.tuning.plan import Assumptions, plan_sweep

    with contextlib.suppress(UserError):
        # Where the shape of the samples is not known, or the method makes no passes that can be counted.
        screen.print(short_plan(plan_sweep(experiment, planned, Assumptions(), data)))


def _print_plan(screen: Console, experiment: Experiment, planned: list[Trial], root: Path) -> None:
    from soflow_platform.training.dataset import check_data
    from soflow_platform.training.flops import request

    screen.print(styled((experiment.name, "bold"), f": {experiment.description}"))
    table = plain_table("trial", "steps", "parameters", "GMAC/forward", "passes/sample", "PFLOP")
    costs = [_cost(trial) for trial in planned]
    for trial, cost in zip(planned, costs, strict=True):
        steps = f"{trial.experiment.training.steps:,}"
        if cost is None:
            table.add_row(trial.name, steps, "-", "-", "-", "-")
            continue
        table.add_row(
            trial.name,
            steps,
            f"{cost.parameters / 1e6:.1f} M",
            f"{cost.forward_gmac:.4g}",
            f"{cost.evaluations_per_sample:.4g}",
            f"{cost.total_petaflops:,.4g}",
        )
    screen.print(table)
    screen.print(
        f"{len(planned)} trials{later_trials(experiment)} of {steps_of(planned)} steps, "
        f"{experiment.training.batch} samples in each step"
    )
    screen.print(f"compared by {experiment.search.metric} ({experiment.mode})")
    screen.print(f"asks Ray for {request(experiment)}")
    states = sorted({f"{cost.state_gigabytes:.3g}" for cost in costs if cost is not None}, key=float)
    if states:
        span = states[0] if len(states) == 1 else f"{states[0]} to {states[-1]}"
        screen.print(
            f"{span} GB of weights, gradients, optimizer and EMA state in each worker, activations besides"
        )
    _print_short_plan(screen, experiment, planned)
    screen.print(f"storage {root}")
    try:
        check_data(experiment)
        screen.print(f"data {experiment.data.source}")
    except UserError as error:
        screen.print(f"before it can run: {error}")


def _cost(trial: Trial) -> Cost | None:
    """What a trial costs; None where its network depends on data that are not read yet."""
    from soflow_platform.training.dataset import expected
    from soflow_platform.training.flops import cost
    from soflow_platform.training.model import describe_network

    data = expected(trial.experiment)
    if data is None:
        return None
    return cost(trial.experiment, describe_network(trial.experiment, data))
