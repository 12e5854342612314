"""Ray Tune: runs the trials of a sweep, their scheduler, and what failed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_core.failures import summarize
from soflow_platform.cluster.capacity import Demand, Machine, concurrent_limit, why_not_one
from soflow_platform.cluster.connection import DRIVER_CPUS, Cluster
from soflow_platform.cluster.ray_internals import draining_nodes
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.failure import Failure
from soflow_platform.training.job import TrialJob
from soflow_platform.training.stop_request import request_save, stop_requested
from soflow_platform.training.trial_log import LOG, TrialLog
from soflow_platform.training.trial_status import TrialState, read_status
from soflow_platform.tuning.trial import TrialTask

if TYPE_CHECKING:
    from soflow_platform.tuning.searcher import SweepSearcher

SAID_EVERY = 60.0
"""Seconds between two lines that say that trials wait for machines."""
DRAIN_SECONDS = 3.0
"""Interval at which Ray is asked which nodes it is to lose."""
QUIET_SECONDS = 15.0
"""How long they wait before it is said."""
PROGRESS_ACTOR_SECONDS = 60.0
"""How long the progress actor may take to answer: one whose process died takes seconds to restart."""

SAVED = "the sweep was asked to stop and its trials are saved: run the same command to go on."
WAITED = "the sweep was asked to stop while its trials waited: run the same command to go on."


class Terminal:
    """Shows lines. Tune writes its callbacks to a file: what is read from there shows nothing, for a terminal cannot be written."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self._show = show

    def __call__(self, text: str) -> None:
        if self._show is not None:
            self._show(text)

    def __reduce__(self) -> tuple[type[Terminal], tuple[()]]:
        return Terminal, ()


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
    say: Terminal


def concurrent_trials(experiment: Experiment, cluster: Cluster) -> int:
    """How many trials run at the same time: no more than can all be placed, so that none waits for another that waits for it.

    Raises UserError where not even one can be placed, unless machines come on demand.
    """
    resources = experiment.resources
    watcher = 0.0 if resources.in_process else DRIVER_CPUS
    demand = Demand(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, watcher)
    limit = concurrent_limit(cluster.rooms, demand)
    if cluster.local:
        # The one CPU more that this Ray has is for watchers.
        limit = min(limit, int((cluster.cpus + 1e-9) // (demand.workers * demand.cpus)))
    if resources.autoscale and not cluster.local:
        return resources.concurrent_trials or max(1, limit)
    least = replace(demand, workers=resources.min_workers or resources.workers)
    if limit < 1 and least.workers < demand.workers:
        # It begins with fewer workers and takes more as machines come.
        limit = min(1, concurrent_limit(cluster.rooms, least))
    if limit < 1:
        way = "" if cluster.local else ", set resources.autoscale where machines come on demand"
        raise UserError(
            f"{why_not_one(cluster.rooms if not cluster.local else [Machine(cluster.cpus, cluster.gpus)], least)}: lower "
            f"resources.workers, cpus_per_worker or gpus_per_worker{way}, or name a larger cluster with --address."
        )
    return min(limit, resources.concurrent_trials or limit)


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
    rung_metric, rung_mode = experiment.rung_metric

    tuner = tune.Tuner(
        TrialActor,
        param_space={} if search else {"task": tune.grid_search([task.as_config() for task in tasks])},
        tune_config=tune.TuneConfig(
            # The scheduler's; a search algorithm has its own, and Tune itself compares nothing.
            metric=rung_metric,
            mode=rung_mode,
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
    return Failure.of_text(_last_line(text) if text.strip() else summarize(error), text)


def _last_line(traceback: str) -> str:
    """The line of a traceback that names the error."""
    return traceback.strip().splitlines()[-1]


def _last_error(trial: Any) -> str:
    """The line that names the error by which one of Tune's trials ended last. Raises OSError where it cannot be read."""
    text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace") if trial.error_file else ""
    return _last_line(text) if text.strip() else "its process was lost"


class DrainWatch:
    """Asks the trials to save where Ray has been told that it will lose a node: a preemption, a drain. To be called in a loop."""

    def __init__(self, settings: TuneSettings, cluster: Cluster) -> None:
        self.settings, self.cluster = settings, cluster
        self._draining: set[str] = set()
        self._looked = 0.0

    def __call__(self, trials: list[Any]) -> None:
        now = time.monotonic()
        if self.cluster.local or not trials or now - self._looked < DRAIN_SECONDS:
            return
        self._looked = now
        draining = draining_nodes()
        if new := draining - self._draining:
            job = _job(trials[0])
            request_save(job.project, job.sweep, f"{len(new)} node(s) are drained")
            self.settings.say(f"{len(new)} node(s) of the cluster are to be lost: running trials save")
        self._draining |= draining


def _sweep_watch(settings: TuneSettings, cluster: Cluster, actor: Any) -> Any:
    """A callback that publishes that Tune restarts a trial, and ends Tune's loop where no trial can run."""
    import ray
    from ray.tune import Callback

    check_ray, drains = cluster.health_check(), DrainWatch(settings, cluster)
    resources = settings.experiment.resources

    class SweepWatch(Callback):
        def __init__(self) -> None:
            self.idle_since: float | None = None
            """Since when trials wait and none runs."""
            self.said = 0.0

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            del iteration, info
            check_ray()
            drains(trials)
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
            if now - self.idle_since > QUIET_SECONDS and now - self.said > SAID_EVERY:
                self.said = now
                if (line := _waits(settings.experiment, now - self.idle_since)) is not None:
                    settings.say(line)
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


def _waits(experiment: Experiment, seconds: float) -> str | None:
    """A line on trials that wait for machines: what one asks for, what is free, and how long it waits.

    None where there is room for one: its process is being started.
    """
    import ray

    resources, free = experiment.resources, ray.available_resources()
    workers = resources.min_workers or resources.workers
    if (
        free.get("CPU", 0.0) >= workers * resources.cpus_per_worker
        and free.get("GPU", 0.0) >= workers * resources.gpus_per_worker
    ):
        return None
    demand = Demand(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker)
    return (
        f"no trial runs: each asks for {demand}, free are {free.get('CPU', 0.0):g} CPU and {free.get('GPU', 0.0):g} GPU; "
        f"waiting for machines since {seconds / 60:.1f} min, at most {resources.wait_minutes:g} min (resources.wait_minutes)"
    )


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
    from ray.tune.schedulers import FIFOScheduler

    from soflow_platform.tuning.halving import Halving

    asha = experiment.search.asha
    if asha is None:
        return FIFOScheduler()
    return Halving(asha, experiment.training.steps, experiment.rung_metric[0])
