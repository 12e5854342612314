"""soflowctl run: check a sweep file, print its plan, run its trials."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from soflow_platform.cli.options import Places
from soflow_platform.cli.shutdown import GracefulShutdown, restart_lost_ray
from soflow_platform.cli.sweep_file import CheckedSweep, print_proxy, read
from soflow_platform.cli.terminal import console
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.code_digest import describe_difference, running_code
from soflow_platform.storage.project import ProjectFolder, find_project, free_bytes, require_writable
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.record import (
    SweepRecord,
    load_record,
    lock_sweep,
    new_or_resumed_record,
    require_unchanged,
    sweep_id,
)
from soflow_platform.tuning.recorded import awaits_results, describe_growth, grown_sweep, known_trials
from soflow_platform.tuning.search_space import Trial

if TYPE_CHECKING:
    from rich.console import Console

    from soflow_pipelines.preparation.builtin import Expected
    from soflow_platform.training.start import Start
    from soflow_platform.tuning.display import TrialOutcome


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
    detach: bool = False
    """Let the command run on the cluster."""
    retry_failed: bool = False
    """Try trials again that failed by their own fault."""
    proxy: str | None = None
    """Sweep file at whose size and length the sweep is run."""

    @property
    def passed_on(self) -> list[str]:
        """The options of the same command on a cluster, where the first steps were tried already."""
        flags = {
            "--again": self.again,
            "--keep": self.keep,
            "--retry-failed": self.retry_failed,
            "--quiet": self.quiet,
        }
        return [*(name for name, given in flags.items() if given), "--no-check"]


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
        from soflow_platform.cli.dry_run import print_dry_run

        print_dry_run(screen, experiment, planned, storage.root)
        return
    from soflow_platform.cli.display import SweepDisplay, show_result
    from soflow_platform.training.dataset import check_data

    data = check_data(experiment)
    require_writable(storage)
    sweep, existing = _existing_sweep(storage, sweep_file, options, screen)
    known = copy.deepcopy(existing)
    if existing is not None:
        planned = known_trials(sweep_file.document, experiment, existing, planned)
        if _is_finished(existing, sweep_file, planned, options, screen):
            show_result(screen, existing, storage)
            _score_best(screen, existing, experiment, Places(address, storage_option, existing.tracking_uri))
            return
        existing.finished = False
    starts = find_starts(planned, data, storage, experiment, existing)
    if options.check:
        _check_first_steps(planned, data)
    if not options.quiet:
        _print_short_plan(screen, experiment, planned, data, storage if existing is None else None)
    from soflow_platform.cluster.connection import require_answer
    from soflow_platform.training.start import start_key
    from soflow_platform.tuning.context import failed_before
    from soflow_platform.tuning.continuation import continue_trials
    from soflow_platform.tuning.sweep import SweepContext, run_sweep

    require_answer(address)
    if existing is not None:
        _require_checkpoints(storage, existing, experiment)
    if options.detach:
        from soflow_platform.cli.detach import detach

        made = new_or_resumed_record(existing, sweep, str(path), experiment, planned)
        detach(screen, storage, made, options.passed_on, address)
        return
    record = new_or_resumed_record(existing, sweep, str(path), experiment, planned)
    for trial in planned:
        if trial.name in starts:
            record.starts[start_key(trial.experiment)] = starts[trial.name].as_dict()
    display = SweepDisplay(screen, experiment, planned, options.quiet, storage=storage)
    failed_trials = _failed_before(storage, record, planned, options.retry_failed)
    context = SweepContext(record, experiment, planned, storage, display, sweep_file.document, failed_trials)
    shutdown = GracefulShutdown(storage, sweep, display, experiment.training.grace_seconds)
    with shutdown, lock_sweep(storage, sweep):
        require_unchanged(storage, sweep, known)
        continue_trials(storage, record, planned, data, display.say)
        outcomes = restart_lost_ray(
            lambda: run_sweep(context, address),
            experiment.resources.max_failures if address is None else 0,
            display.say,
            lambda: stop_requested(storage, sweep),
        )
    show_result(screen, record, storage, outcomes)
    if failure := describe_failures(outcomes, failed_before(storage, record, planned)):
        raise JobError(failure)
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


def _existing_sweep(
    storage: ProjectFolder, sweep_file: CheckedSweep, options: RunOptions, screen: Console
) -> tuple[str, SweepRecord | None]:
    """The id of the sweep that the file stands for, and its record where it was started or is one that the file adds trials to.

    Raises UserError where other code has trained it, unless that is to be kept.
    """
    experiment = sweep_file.experiment
    sweep = sweep_id(storage, experiment, options.again)
    existing = load_record(storage, sweep)
    if existing is None and not options.again:
        existing = _grown_sweep(storage, sweep_file, options.keep, screen)
    if existing is None:
        return sweep, None
    _check_code(storage, existing, options.keep, screen)
    return existing.id, existing


def _grown_sweep(
    storage: ProjectFolder, sweep_file: CheckedSweep, keep: bool, screen: Console
) -> SweepRecord | None:
    """The sweep that the file adds trials to; None where there is none, and, unless it is to be kept, where other code trained it."""
    grown = grown_sweep(storage, sweep_file.experiment, sweep_file.trials)
    if grown is None or not grown.other_code or keep:
        return None if grown is None else grown.record
    difference = describe_difference(list(grown.other_code))
    screen.print(
        f"sweep {grown.record.id} has some of these trials and was trained by other code than this ({difference}): this is a sweep of "
        "its own; --keep adds to that one.",
        highlight=False,
    )
    return None


def _is_finished(
    record: SweepRecord, sweep_file: CheckedSweep, trials: list[Trial], options: RunOptions, screen: Console
) -> bool:
    """Whether nothing of a sweep is left to be done, which is then said; else what the file adds to it is."""
    growth = describe_growth(record, trials)
    if growth is not None and not options.quiet:
        screen.print(f"{growth}.", highlight=False)
    if not record.finished or growth is not None or awaits_results(sweep_file.experiment, trials):
        return False
    screen.print(f"sweep {record.id} is finished; --again runs it anew.")
    return True


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


def _failed_before(
    storage: ProjectFolder, record: SweepRecord, planned: list[Trial], retry: bool
) -> dict[str, str]:
    """The trials that failed before and stay so: with other code, or on request, they are tried again."""
    from soflow_platform.tuning.context import failed_before

    if retry or record.code[-1:] != [running_code().digest]:
        return {}
    return failed_before(storage, record, planned)


def describe_failures(outcomes: list[TrialOutcome], own: Mapping[str, str]) -> str | None:
    """How many trials failed and by what, with what tries them again; None where none did. `own` failed by their own fault."""
    failed = {o.name: str(o.status.failure) for o in outcomes if o.status.state is TrialState.FAILED}
    if not failed:
        return None
    reasons = []
    for reason in dict.fromkeys(failed.values()):
        names = [name for name, each in failed.items() if each == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        reasons.append(f"{names[0]}{more}: {reason}")
    others = [name for name in failed if name not in own]
    way = "the same command tries them again" if others else "--retry-failed tries them again"
    if others and len(others) < len(failed):
        way = f"the same command tries {len(others)} of them again, --retry-failed all"
    return f"{len(failed)} of {len(outcomes)} trials failed ({'; '.join(reasons)}); {way}."


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


def _print_short_plan(
    screen: Console,
    experiment: Experiment,
    planned: list[Trial],
    data: Expected | None = None,
    begun_in: ProjectFolder | None = None,
) -> None:
    """The plan in short; of a sweep that begins in a project folder also whether its checkpoints have room there."""
    from soflow_platform.cli.plan import short_plan, space_note
    from soflow_platform.tuning.plan import plan_sweep
    from soflow_platform.tuning.plan_assumptions import Assumptions

    with contextlib.suppress(UserError):
        # Where the shape of the samples is not known, or the method makes no passes that can be counted.
        plan = plan_sweep(experiment, planned, Assumptions(), data)
        screen.print(short_plan(plan))
        if begun_in is not None and experiment.training.checkpoints is None:
            note = space_note(plan, begun_in.root, free_bytes(begun_in.root))
            if note is not None:
                screen.print(note, highlight=False, soft_wrap=True)
