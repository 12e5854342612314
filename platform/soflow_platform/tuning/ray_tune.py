"""soflow_platform.tuning.ray_tune"""

from __future__ import annotations

import logging
from typing import Any

from soflow_platform.cluster.connection import DRIVER_CPUS, Cluster
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.trial_status import read_status
from soflow_platform.tuning.record import SweepRecord
from soflow_platform.tuning.trial import run_trial

PROGRESS_ACTOR_SECONDS = 60.0
"""How long the progress actor may take to answer: one whose process died takes seconds to restart."""


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


def run_trials(
    record: SweepRecord,
    tasks: list[dict[str, Any]],
    experiment: Experiment,
    storage: ProjectFolder,
    concurrent: int,
    cluster: Cluster,
    actor: Any,
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
            callbacks=[_health_check(cluster)],
        ),
    )
    results = tuner.fit()
    cluster.require_alive()
    failures = _reported_failures(record, tasks, storage, actor)
    for index, task in enumerate(tasks):
        error = results[index].error
        if error is not None:
            failures.setdefault(task["trial"], str(error).strip().splitlines()[-1])
    return failures


def _health_check(cluster: Cluster) -> Any:
    """Ends Tune's loop with RayLost where the Ray under it has died."""
    from ray.tune import Callback

    check_ray = cluster.health_check()

    class HealthCheck(Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            del iteration, trials, info
            check_ray()

    return HealthCheck()


def _reported_failures(
    record: SweepRecord, tasks: list[dict[str, Any]], storage: ProjectFolder, actor: Any
) -> dict[str, str]:
    """Trials' failures in this attempt, from the progress actor, and from status files where it has restarted since."""
    import ray

    failures = {}
    for task in tasks:
        status = read_status(storage.trial(record.id, task["trial"]))
        if status is not None and status.attempt == record.attempts and status.failure:
            failures[task["trial"]] = status.failure
    statuses = ray.get(actor.snapshot.remote(), timeout=PROGRESS_ACTOR_SECONDS)
    return failures | {name: status.failure for name, status in statuses.items() if status.failure}


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
