"""A sweep from its settings to a registered model: data, trials under Ray Tune, the best one chosen and registered.

Everything found here can be interrupted at any point; the same settings go on where they stood.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from soflow_pipelines.shards import DatasetInfo
from soflow_platform import checkpoints
from soflow_platform.cluster import DRIVER_CPUS, Cluster, connected, start_coordinator
from soflow_platform.config.experiment import Experiment, flatten
from soflow_platform.config.trials import Trial
from soflow_platform.data import open_data
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.evaluation import Evaluator
from soflow_platform.jobs.gather import Gathering, Report, silent
from soflow_platform.progress import start_board
from soflow_platform.registry import register
from soflow_platform.retries import first_line, retry
from soflow_platform.stops import clear_stops, stop_requested
from soflow_platform.storage import Storage, read_json
from soflow_platform.sweep_record import SweepRecord
from soflow_platform.tracking import Tracking, host_tags, is_away, prepare_store, tracked_dataset
from soflow_platform.trial import TrialTask, run_trial
from soflow_platform.trial_report import STATUS

T = TypeVar("T")

LOOK_SECONDS = 5.0
"""How often the driver looks whether its Ray is alive."""
BOARD_SECONDS = 60.0
"""A board whose process died takes seconds to begin anew."""


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial ended. `state`: finished, stopped (by the scheduler), asked to stop, or failed."""

    name: str
    state: str
    step: int
    best: dict[str, Any] | None
    """The evaluation with the best value of the search metric."""
    failure: str | None = None


class Display:
    """What a sweep tells its watcher; this one is silent."""

    def start(self, record: SweepRecord, cluster: Cluster, board: Any) -> None:
        """Trials begin."""

    def stop(self) -> None:
        """Trials have ended."""

    def say(self, text: str) -> None:
        """One line about what is being done."""

    @contextlib.contextmanager
    def describing(self) -> Iterator[Report]:
        """The real images are described; the report says how many are."""
        yield silent


def run_sweep(
    record: SweepRecord,
    experiment: Experiment,
    trials: list[Trial],
    storage: Storage,
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
            start_coordinator()
        display.say("preparing data and reference statistics")
        location, info = open_data(experiment, storage)
        with display.describing() as report, Gathering(storage, report=report, cluster=cluster) as gathering:
            evaluator = Evaluator.open(
                experiment.evaluation, info, location, experiment.data.conditional, storage, gathering.one
            )
        prepare_store(uri)
        tracking = Tracking.open(uri, experiment.tracking.experiment or experiment.name, storage)
        shared = {**host_tags(), **evaluator.tags()}
        tags = {**common_tags(experiment, info), **shared}
        with _sweep_run(record, experiment, tracking, tags, display.say):
            record.experiment_id, record.tracking_uri = tracking.experiment_id, uri
            record.attempts += 1
            record.save(storage)
            tasks = [_task(record, trial, storage, location, tracking, info, shared) for trial in trials]
            board = start_board(f"progress-{record.id}")
            display.start(record, cluster, board)
            try:
                failures = _run_trials(record, tasks, experiment, storage, concurrent, cluster, board)
            finally:
                display.stop()
            if stop_requested(storage, record.id):
                raise Stopped(
                    "the sweep was asked to stop and its trials are saved: run the same command to go on."
                )
            return _finish(record, experiment, trials, storage, tracking, failures, display)


def concurrent_trials(experiment: Experiment, cluster: Cluster) -> int:
    """How many trials run at the same time. Raises UserError where not even one fits."""
    resources = experiment.resources
    cpus = resources.workers * resources.cpus_per_worker
    gpus = resources.workers * resources.gpus_per_worker
    fits = int((cluster.cpus + 1e-9) // (cpus + (0 if cluster.local else DRIVER_CPUS)))
    if gpus:
        fits = min(fits, int((cluster.gpus + 1e-9) // gpus))
    if fits < 1:
        raise UserError(
            f"one trial asks for {cpus:g} CPU and {gpus:g} GPU ({resources.workers} workers) and this Ray has "
            f"{cluster.cpus:g} CPU and {cluster.gpus:g} GPU: lower resources.workers, cpus_per_worker or gpus_per_worker, "
            "or name a larger cluster with --address."
        )
    return min(fits, resources.concurrent_trials or fits)


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
                f"the sweep's runs could not be marked {state} and stay RUNNING until it is started again: {first_line(failure)}"
            )
        raise


def _task(
    record: SweepRecord,
    trial: Trial,
    storage: Storage,
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
            tracking_uri=tracking.uri,
            tracking_experiment=tracking.experiment,
            tracking_experiment_id=tracking.experiment_id,
            parent=record.run or "",
            tags={**common_tags(trial.experiment, info), **shared, **varied},
        )
    )


def _run_trials(
    record: SweepRecord,
    tasks: list[dict[str, Any]],
    experiment: Experiment,
    storage: Storage,
    concurrent: int,
    cluster: Cluster,
    board: Any,
) -> dict[str, str]:
    """Run the trials under Ray Tune. Returns what failed: trial name -> sentence."""
    from ray import tune

    # What fails is told in a sentence each; Tune's tracebacks are in its files.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    def name(trial: Any) -> str:
        return str(trial.config["task"]["trial"])

    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"CPU": DRIVER_CPUS}),
        param_space={"task": tune.grid_search(tasks)},
        tune_config=tune.TuneConfig(
            metric=experiment.search.metric,
            mode=experiment.mode,
            max_concurrent_trials=concurrent,
            scheduler=_scheduler(experiment),
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{record.attempts}",
            storage_path=str(storage.sweep(record.id)),
            # The function that drives a trial may be on the node that is lost.
            failure_config=tune.FailureConfig(max_failures=experiment.resources.max_failures),
            verbose=0,
            callbacks=[_watch(cluster)],
        ),
    )
    results = tuner.fit()
    cluster.require_alive()
    failures = _told_failures(record, tasks, storage, board)
    for index, task in enumerate(tasks):
        error = results[index].error
        if error is not None:
            failures.setdefault(task["trial"], str(error).strip().splitlines()[-1])
    return failures


def _watch(cluster: Cluster) -> Any:
    """Ends Tune's loop with RayLost where the Ray under it has died."""
    from ray.tune import Callback

    class Watch(Callback):
        looked = 0.0

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            del iteration, trials, info
            if time.monotonic() - self.looked > LOOK_SECONDS:
                self.looked = time.monotonic()
                cluster.require_alive()

    return Watch()


def _told_failures(
    record: SweepRecord, tasks: list[dict[str, Any]], storage: Storage, board: Any
) -> dict[str, str]:
    """What trials said of their failure in this attempt: to the board, or in their status where that has begun anew since."""
    import ray

    failures = {}
    for task in tasks:
        told = read_json(storage.trial(record.id, task["trial"]) / STATUS) or {}
        if told.get("attempt") == record.attempts and told.get("failure"):
            failures[task["trial"]] = str(told["failure"])
    progress = ray.get(board.snapshot.remote(), timeout=BOARD_SECONDS)
    return failures | {name: now.failure for name, now in progress.items() if now.failure}


def _scheduler(experiment: Experiment) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    asha = experiment.search.asha
    if asha is None:
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="step",
        max_t=experiment.training.steps,
        grace_period=asha.first_rung,
        reduction_factor=asha.reduction,
    )


def _finish(
    record: SweepRecord,
    experiment: Experiment,
    trials: list[Trial],
    storage: Storage,
    tracking: Tracking,
    failures: dict[str, str],
    display: Display,
) -> list[TrialOutcome]:
    """See how the trials ended, close their runs, choose and register the best. Raises JobError where an outage lasts."""

    def patiently(action: Callable[[], T], what: str) -> T:
        return retry(action, what, 60 * experiment.training.patience_minutes, display.say, is_away)

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
    storage: Storage, record: SweepRecord, experiment: Experiment, trial: Trial, failures: dict[str, str]
) -> TrialOutcome:
    root = _checkpoint_root(storage, record, experiment, trial.name)
    # What is used from here on are weights; what training would go on from is verified when it does.
    newest, _ = checkpoints.newest(root, [checkpoints.EMA])
    step = newest.position.step if newest else 0
    scored = checkpoints.best(root, experiment.search.metric, experiment.mode)
    best = scored[1] if scored else None
    if trial.name in failures:
        return TrialOutcome(trial.name, "failed", step, best, failures[trial.name])
    if step == trial.experiment.training.steps:
        return TrialOutcome(trial.name, "finished", step, best)
    asked = stop_requested(storage, record.id, trial.name)
    return TrialOutcome(trial.name, "asked to stop" if asked else "stopped", step, best)


def _checkpoint_root(storage: Storage, record: SweepRecord, experiment: Experiment, trial: str) -> str:
    return checkpoints.trial_root(experiment.training.checkpoints, storage, record.id, trial)


def _close_trials(tracking: Tracking, record: SweepRecord, outcomes: list[TrialOutcome]) -> None:
    ends = {"failed": "FAILED", "asked to stop": "KILLED"}
    states = {o.name: ends.get(o.state, "FINISHED") for o in outcomes}
    for run in tracking.children(record.run or ""):
        state = states.get(run.data.tags.get("soflow.trial", ""))
        if state and run.info.status != state:
            tracking.finish(run.info.run_id, state)


def _conclude(
    record: SweepRecord,
    experiment: Experiment,
    storage: Storage,
    tracking: Tracking,
    outcomes: list[TrialOutcome],
    display: Display,
) -> None:
    """Choose the best trial, register its EMA weights, and close the sweep."""
    metric = experiment.search.metric
    scored = [o for o in outcomes if o.best is not None and o.state != "failed"]
    if not scored:
        reasons = "; ".join(f"{o.name}: {o.failure or 'not scored'}" for o in outcomes)
        raise JobError(
            f"no trial of sweep {record.id} could be scored ({reasons}); the same command tries again."
        )
    sign: Callable[[float], float] = (lambda v: v) if experiment.mode == "min" else (lambda v: -v)
    best = min(scored, key=lambda o: sign((o.best or {})[metric]))
    step = (best.best or {})["step"]
    root = _checkpoint_root(storage, record, experiment, best.name)
    checkpoint = next((c for c in checkpoints.published(root) if c.position.step == step), None)
    if checkpoint is None:
        raise JobError(f"the best checkpoint, step {step} of {best.name}, is gone from {root}.")
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
        version = register(tracking, experiment, record, checkpoint)
        record.best["model"], record.best["version"] = experiment.model_name, version
    failed = [o for o in outcomes if o.state == "failed"]
    record.finished = not failed and all(o.state != "asked to stop" for o in outcomes)
    record.save(storage)
    run = record.run or ""
    tracking.log_result(run, record.best)
    tracking.finish(run, "FAILED" if failed else "FINISHED")
