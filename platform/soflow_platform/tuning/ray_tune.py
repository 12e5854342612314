"""Ray Tune: runs the trials of a sweep, their scheduler, and what failed."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_core.failures import summarize
from soflow_platform.cluster.connection import DRIVER_CPUS, Cluster
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.failure import Failure
from soflow_platform.training.job import TrialJob
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_log import LOG, TrialLog
from soflow_platform.training.trial_status import TrialState, read_status
from soflow_platform.tuning.trial import TrialTask

if TYPE_CHECKING:
    from soflow_platform.tuning.searcher import SweepSearcher

PROGRESS_ACTOR_SECONDS = 60.0
"""How long the progress actor may take to answer: one whose process died takes seconds to restart."""

SAVED = "the sweep was asked to stop and its trials are saved: run the same command to go on."
WAITED = "the sweep was asked to stop while its trials waited: run the same command to go on."


@dataclass(frozen=True)
class TuneSettings:
    """What Tune needs beside the trials' tasks."""

    experiment: Experiment
    concurrent: int
    """Trials that run at the same time."""
    name: str
    """Of Tune's own folder within the sweep's."""
    folder: Path
    """The sweep's folder."""


def concurrent_trials(experiment: Experiment, cluster: Cluster) -> int:
    """How many trials run at the same time. Raises UserError where not even one fits."""
    resources = experiment.resources
    cpus = resources.workers * resources.cpus_per_worker
    gpus = resources.workers * resources.gpus_per_worker
    driver = 0 if cluster.local or resources.in_process else DRIVER_CPUS
    fits = int((cluster.cpus + 1e-9) // (cpus + driver))
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
    tasks: list[TrialTask],
    settings: TuneSettings,
    cluster: Cluster,
    actor: Any,
    search: SweepSearcher | None = None,
) -> dict[str, Failure]:
    """Run the trials under Ray Tune. Returns, by trial name, the errors that Tune has of them.

    `actor` is the sweep's progress actor. With `search`, which has the same list of tasks, further ones are appended to it.

    Raises RayLost where the Ray of this process dies, JobError where no machine comes for a trial, and Stopped where the sweep was
    asked to stop and none runs.
    """
    from ray import tune

    from soflow_platform.tuning.trial_actor import TrialActor

    # Failures are printed in a sentence each; Tune's tracebacks are in its files.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    experiment = settings.experiment

    tuner = tune.Tuner(
        TrialActor,
        param_space={} if search else {"task": tune.grid_search([task.as_config() for task in tasks])},
        tune_config=tune.TuneConfig(
            metric=experiment.search.metric,
            mode=experiment.mode,
            search_alg=search,
            num_samples=search.samples if search else 1,
            max_concurrent_trials=settings.concurrent,
            scheduler=_scheduler(experiment),
            trial_name_creator=trial_name,
            trial_dirname_creator=trial_name,
            # A trial that is ended early leaves its Ray Train run to die with its process.
            reuse_actors=experiment.resources.in_process,
        ),
        run_config=tune.RunConfig(
            name=settings.name,
            storage_path=str(settings.folder),
            # The function that drives a trial may be on the node that is lost.
            failure_config=tune.FailureConfig(max_failures=experiment.resources.max_failures),
            # Trials save themselves; Tune need not.
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
            verbose=0,
            callbacks=[_sweep_watch(settings, cluster, actor), _silent_progress()],
        ),
    )
    results = tuner.fit()
    cluster.require_alive()
    # In the order in which Tune was given them.
    errors = {task.job.trial: result.error for task, result in zip(tasks, results, strict=False)}
    return {trial: _failure(error) for trial, error in errors.items() if error is not None}


def trial_name(trial: Any) -> str:
    """The sweep's name of one of Tune's trials."""
    return str(trial.config["task"]["job"]["trial"])


def _job(trial: Any) -> TrialJob:
    """The job of one of Tune's trials."""
    return TrialJob(**trial.config["task"]["job"])


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


def _failure(error: BaseException) -> Failure:
    """Tune's error of a trial, whose text is the traceback."""
    text = str(error)
    return Failure(_last_line(text) if text.strip() else summarize(error), text)


def _last_line(traceback: str) -> str:
    """The line of a traceback that names the error."""
    return traceback.strip().splitlines()[-1]


def _last_error(trial: Any) -> str:
    """The line that names the error by which one of Tune's trials ended last. Raises OSError where it cannot be read."""
    text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace") if trial.error_file else ""
    return _last_line(text) if text.strip() else "its process was lost"


def _sweep_watch(settings: TuneSettings, cluster: Cluster, actor: Any) -> Any:
    """A callback that publishes that Tune restarts a trial, and ends Tune's loop where no trial can run."""
    import ray
    from ray.tune import Callback

    check_ray = cluster.health_check()
    resources = settings.experiment.resources

    class SweepWatch(Callback):
        def __init__(self) -> None:
            self.idle_since: float | None = None
            """Since when trials wait and none runs."""

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            del iteration, info
            check_ray()
            states = {trial.status for trial in trials}
            if "RUNNING" in states or "PENDING" not in states:
                self.idle_since = None
                return
            now = time.monotonic()
            self.idle_since = now if self.idle_since is None else self.idle_since
            job = _job(trials[0])
            if stop_requested(job.project, job.sweep):
                # Those that have run are saved; the others wait for their turn, or for a machine.
                raise Stopped(SAVED if states != {"PENDING"} else WAITED)
            if now - self.idle_since > 60 * resources.wait_minutes:
                raise JobError(
                    f"no machine for a trial came within {resources.wait_minutes:g} min (resources.wait_minutes): add a node, or lower "
                    "what resources asks for; the same command goes on."
                )

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            del iteration, trials, info
            name = trial_name(trial)
            try:
                progress = ray.get(actor.progress.remote(name), timeout=PROGRESS_ACTOR_SECONDS)
            except ray.exceptions.RayError:
                # Where all of this process's Ray has died, the next step says so.
                return
            if progress.failure:
                # It is started again to end in a process that later trials can use.
                return
            actor.update.remote(name, {"state": TrialState.RESTARTING, "lost": "its process"})
            with contextlib.suppress(OSError):
                log = TrialLog(_job(trial).folder / LOG)
                log.write(f"it ended unexpectedly and is started again: {_last_error(trial)}")

    return SweepWatch()


def _silent_progress() -> Any:
    """A callback in the place of Tune's own, which prints a line for a trial that ends without a result, however quiet it is set."""
    from ray.tune.progress_reporter import TrialProgressCallback

    class SilentProgress(TrialProgressCallback):
        def on_trial_result(self, *args: Any, **info: Any) -> None:
            pass

        def on_trial_error(self, *args: Any, **info: Any) -> None:
            pass

        def on_trial_complete(self, *args: Any, **info: Any) -> None:
            pass

    return SilentProgress()


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
