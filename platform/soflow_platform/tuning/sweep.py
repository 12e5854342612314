"""A sweep from its settings to a registered model: data, trials under Ray Tune, the best one chosen and registered.

Everything found here can be interrupted at any point; the same settings go on where they stood.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

from soflow_core.failures import summarize
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.cluster.connection import connected
from soflow_platform.cluster.ray_internals import start_autoscaling_coordinator
from soflow_platform.config.experiment import Experiment, flatten
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.evaluation.evaluator import Evaluator
from soflow_platform.evaluation.runner import RayStatisticsRunner
from soflow_platform.registry.versions import register
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.storage.retry import retry
from soflow_platform.tracking.environment import host_tags
from soflow_platform.tracking.outages import is_away
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, tracked_dataset
from soflow_platform.training.dataset import open_data
from soflow_platform.training.stop_request import clear_stops, stop_requested
from soflow_platform.training.trial_status import TrialState, TrialStatus
from soflow_platform.tuning.display import Display, TrialOutcome
from soflow_platform.tuning.progress import start_progress_actor
from soflow_platform.tuning.ray_tune import concurrent_trials, run_trials
from soflow_platform.tuning.record import SweepRecord
from soflow_platform.tuning.search_space import Trial
from soflow_platform.tuning.trial import TrialTask

T = TypeVar("T")


def run_sweep(
    record: SweepRecord,
    experiment: Experiment,
    trials: list[Trial],
    storage: ProjectFolder,
    address: str | None,
    display: Display,
) -> list[TrialOutcome]:
    """Run what is missing of a sweep, choose the best trial, register it, and note both in the record.

    Raises JobError where no trial could be scored, and Stopped where the sweep was asked to stop.
    """
    # Before anything that takes time: a stop that is asked for from here on is meant for this attempt.
    clear_stops(storage, record.id)
    uri = experiment.tracking.uri or storage.tracking_uri
    with connected(address) as cluster:
        concurrent = concurrent_trials(experiment, cluster)
        if cluster.machines > 1 and uri.startswith("sqlite:"):
            raise UserError(
                f"this cluster has {cluster.machines} machines and SQLite serves one: start a tracking server "
                "(`mlflow server`) and set tracking.uri to its address."
            )
        if not cluster.local:
            start_autoscaling_coordinator()
        display.say("preparing data and reference statistics")
        location, info = open_data(experiment, storage)
        with (
            display.describing() as report,
            RayStatisticsRunner(storage, report=report, cluster=cluster) as gathering,
        ):
            evaluator = Evaluator.open(
                experiment.evaluation, info, location, experiment.data.conditional, storage, gathering.one
            )
        tracking = Tracking.open(uri, experiment.tracking.experiment or experiment.name, storage)
        shared = {**host_tags(), **evaluator.tags()}
        tags = {**common_tags(experiment, info), **shared}
        with _sweep_run(record, experiment, tracking, tags, display.say):
            record.experiment_id, record.tracking_uri = tracking.experiment_id, uri
            record.attempts += 1
            record.save(storage)
            tasks = [_task(record, trial, storage, location, tracking, info, shared) for trial in trials]
            board = start_progress_actor(record.id)
            display.start(record, cluster, board)
            try:
                failures = run_trials(record, tasks, experiment, storage, concurrent, cluster, board)
            finally:
                display.stop()
            if stop_requested(storage, record.id):
                raise Stopped(
                    "the sweep was asked to stop and its trials are saved: run the same command to go on."
                )
            return _finish(record, experiment, trials, storage, tracking, failures, display)


def common_tags(experiment: Experiment, info: DatasetInfo) -> dict[str, str]:
    """What is trained on what: tags of the sweep's run and of each trial's."""
    network = experiment.network
    size = network.size or f"DiT-{network.hidden}x{network.depth}/{network.patch}"
    return {
        "method": experiment.objective.method,
        "network": size,
        "data.source": str(experiment.data.source),
        "data.digest": info.digest,
    }


@contextlib.contextmanager
def _sweep_run(
    record: SweepRecord,
    experiment: Experiment,
    tracking: Tracking,
    tags: dict[str, str],
    say: Callable[[str], None],
) -> Iterator[None]:
    """The sweep's MLflow run, closed with its trials' runs however the block ends; where they cannot be, that is said."""
    note = {"mlflow.note.content": experiment.description} if experiment.description else {}
    record.run = tracking.open_run(
        record.id,
        record.id,
        params=flatten(experiment.resolved()),
        tags={**tags, **note},
        dataset=tracked_dataset(tags),
    )
    try:
        yield
    except BaseException as error:
        state = "FAILED" if isinstance(error, Exception) and not isinstance(error, Stopped) else "KILLED"
        try:
            for run in tracking.children(record.run):
                if run.info.status == "RUNNING":
                    tracking.finish(run.info.run_id, state)
            tracking.finish(record.run, state)
        except Exception as failure:
            # What ended the block is what the command reports.
            say(
                f"the sweep's runs could not be marked {state} and stay RUNNING until it is started again: {summarize(failure)}"
            )
        raise


def _task(
    record: SweepRecord,
    trial: Trial,
    storage: ProjectFolder,
    location: str,
    tracking: Tracking,
    info: DatasetInfo,
    shared: dict[str, str],
) -> dict[str, Any]:
    varied = {f"search.{key}": str(value) for key, value in trial.settings.items()}
    return asdict(
        TrialTask(
            sweep=record.id,
            attempt=record.attempts,
            trial=trial.name,
            experiment=trial.experiment.resolved(),
            data=location,
            storage=str(storage.root),
            tracking_uri=tracking.store.uri,
            tracking_experiment_id=tracking.experiment_id,
            parent=record.run or "",
            tags={**common_tags(trial.experiment, info), **shared, **varied},
        )
    )


def _finish(
    record: SweepRecord,
    experiment: Experiment,
    trials: list[Trial],
    storage: ProjectFolder,
    tracking: Tracking,
    failures: dict[str, str],
    display: Display,
) -> list[TrialOutcome]:
    """See how the trials ended, close their runs, choose and register the best. Raises JobError where an outage lasts."""

    def patiently(action: Callable[[], T], description: str) -> T:
        timeout = 60 * experiment.training.patience_minutes
        return retry(action, description=description, timeout=timeout, log=display.say, is_transient=is_away)

    outcomes = patiently(
        lambda: [_outcome(storage, record, experiment, trial, failures) for trial in trials],
        "reading the trials' checkpoints",
    )
    patiently(lambda: _close_trials(tracking, record, outcomes), "closing the trials' runs")
    patiently(
        lambda: _conclude(record, experiment, storage, tracking, outcomes, display), "concluding the sweep"
    )
    return outcomes


def _outcome(
    storage: ProjectFolder,
    record: SweepRecord,
    experiment: Experiment,
    trial: Trial,
    failures: dict[str, str],
) -> TrialOutcome:
    store = _checkpoints(storage, record, experiment, trial.name)
    # What is used from here on are weights; what training would go on from is verified when it does.
    newest, _ = store.newest([checkpoints.EMA])
    step = newest.state.step if newest else 0
    scored = store.best(experiment.search.metric, experiment.mode)
    best = scored[1] if scored else None
    if trial.name in failures:
        state = TrialState.FAILED
    elif step == trial.experiment.training.steps:
        state = TrialState.FINISHED
    else:
        asked = stop_requested(storage, record.id, trial.name)
        state = TrialState.STOPPED if asked else TrialState.PRUNED
    status = TrialStatus(
        state=state, step=step, steps=trial.experiment.training.steps, failure=failures.get(trial.name)
    )
    return TrialOutcome(trial.name, status, best)


def _checkpoints(
    storage: ProjectFolder, record: SweepRecord, experiment: Experiment, trial: str
) -> CheckpointStore:
    return CheckpointStore.of_trial(storage, record.id, trial, experiment.training.checkpoints)


def _close_trials(tracking: Tracking, record: SweepRecord, outcomes: list[TrialOutcome]) -> None:
    ends = {TrialState.FAILED: "FAILED", TrialState.STOPPED: "KILLED"}
    states = {o.name: ends.get(o.status.state, "FINISHED") for o in outcomes}
    for run in tracking.children(record.run or ""):
        state = states.get(run.data.tags.get(TRIAL_TAG, ""))
        if state and run.info.status != state:
            tracking.finish(run.info.run_id, state)


def _conclude(
    record: SweepRecord,
    experiment: Experiment,
    storage: ProjectFolder,
    tracking: Tracking,
    outcomes: list[TrialOutcome],
    display: Display,
) -> None:
    """Choose the best trial, register its EMA weights, and close the sweep."""
    metric = experiment.search.metric
    scored = [o for o in outcomes if o.best is not None and o.status.state is not TrialState.FAILED]
    if not scored:
        reasons = "; ".join(f"{o.name}: {o.status.failure or 'not scored'}" for o in outcomes)
        raise JobError(
            f"no trial of sweep {record.id} could be scored ({reasons}); the same command tries again."
        )
    sign: Callable[[float], float] = (lambda v: v) if experiment.mode == "min" else (lambda v: -v)
    best = min(scored, key=lambda o: sign((o.best or {})[metric]))
    step = (best.best or {})["step"]
    store = _checkpoints(storage, record, experiment, best.name)
    checkpoint = next((c for c in store.published() if c.state.step == step), None)
    if checkpoint is None:
        raise JobError(f"the best checkpoint, step {step} of {best.name}, is gone from {store.root}.")
    samples = storage.trial(record.id, best.name) / "samples"
    record.best = {
        "trial": best.name,
        "step": step,
        "metrics": {k: v for k, v in (best.best or {}).items() if k != "step"},
        "grids": [str(path) for path in sorted(samples.glob(f"*-step-{step:08d}.png"))],
        "checkpoint": checkpoint.location,
    }
    if experiment.registry.enabled:
        display.say("registering the best trial")
        version = register(tracking, record.candidate(experiment.model_name), checkpoint)
        record.best["model"], record.best["version"] = experiment.model_name, version
    failed = [o for o in outcomes if o.status.state is TrialState.FAILED]
    record.finished = not failed and all(o.status.state is not TrialState.STOPPED for o in outcomes)
    record.save(storage)
    run = record.run or ""
    tracking.log_result(run, record.best)
    tracking.finish(run, "FAILED" if failed else "FINISHED")
