"""Ray Tune: runs the trials of a sweep, their scheduler, and what failed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soflow_core.failures import summarize
from soflow_platform.cluster.connection import DRIVER_CPUS, Cluster
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.trial_status import read_status
from soflow_platform.tuning.trial import TrialTask, run_trial

PROGRESS_ACTOR_SECONDS = 60.0
"""How long the progress actor may take to answer: one whose process died takes seconds to restart."""


@dataclass(frozen=True)
class TuneSettings:
    """What Tune needs beside the trials' tasks."""

    experiment: Experiment
    concurrent: int
    """Trials that run at the same time."""
    attempt: int
    """The start of the sweep."""
    folder: Path
    """The sweep's folder."""


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


def run_trials(tasks: list[TrialTask], settings: TuneSettings, cluster: Cluster) -> dict[str, str]:
    """Run the trials under Ray Tune. Returns the errors that Tune has of them: trial name -> sentence.

    Raises RayLost where the Ray of this process dies.
    """
    from ray import tune

    # Failures are printed in a sentence each; Tune's tracebacks are in its files.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    experiment = settings.experiment

    def name(trial: Any) -> str:
        return str(trial.config["task"]["job"]["trial"])

    tuner = tune.Tuner(
        tune.with_resources(run_trial, {"CPU": DRIVER_CPUS}),
        param_space={"task": tune.grid_search([task.as_config() for task in tasks])},
        tune_config=tune.TuneConfig(
            metric=experiment.search.metric,
            mode=experiment.mode,
            max_concurrent_trials=settings.concurrent,
            scheduler=_scheduler(experiment),
            trial_name_creator=name,
            trial_dirname_creator=name,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{settings.attempt}",
            storage_path=str(settings.folder),
            # The function that drives a trial may be on the node that is lost.
            failure_config=tune.FailureConfig(max_failures=experiment.resources.max_failures),
            verbose=0,
            callbacks=[_health_check(cluster)],
        ),
    )
    results = tuner.fit()
    cluster.require_alive()
    errors = {task.job.trial: results[index].error for index, task in enumerate(tasks)}
    return {trial: _last_line(error) for trial, error in errors.items() if error is not None}


def reported_failures(tasks: list[TrialTask], storage: ProjectFolder, actor: Any) -> dict[str, str]:
    """Failures that trials reported in this attempt, from the progress actor, and from status files where it has restarted since."""
    import ray

    failures = {}
    for job in (task.job for task in tasks):
        status = read_status(storage.trial(job.sweep, job.trial))
        if status is not None and status.attempt == job.attempt and status.failure:
            failures[job.trial] = status.failure
    statuses = ray.get(actor.snapshot.remote(), timeout=PROGRESS_ACTOR_SECONDS)
    return failures | {name: status.failure for name, status in statuses.items() if status.failure}


def _last_line(error: BaseException) -> str:
    """The line of a traceback that names the error."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else summarize(error)


def _health_check(cluster: Cluster) -> Any:
    """A callback that ends Tune's loop with RayLost where the Ray under it has died."""
    from ray.tune import Callback

    check_ray = cluster.health_check()

    class HealthCheck(Callback):
        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            del iteration, trials, info
            check_ray()

    return HealthCheck()


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
