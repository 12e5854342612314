"""One trial as Ray Tune sees it: a function that drives a Ray Train run and hands its evaluations to the scheduler.

What was evaluated before an interruption is reported first, from the trial's own checkpoint, so that a scheduler and a searcher that
start anew know what they knew.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soflow_core.failures import summarize
from soflow_platform.cluster.placement import release_placement_group
from soflow_platform.config.experiment import Experiment, trial_params
from soflow_platform.storage.checkpoints import EMA, CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.storage.retry import retry
from soflow_platform.tracking.outages import is_outage
from soflow_platform.tracking.store import Tracking, TrackingStore, tracked_dataset
from soflow_platform.training.job import TrialJob
from soflow_platform.training.launch import ray_trainer
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_status import TrialState, TrialStatusWriter, progress_actor

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrialTask:
    """What Tune passes to a trial: plain data."""

    sweep: str
    attempt: int
    trial: str
    experiment: dict[str, Any]
    data: str
    storage: str
    tracking_uri: str
    tracking_experiment_id: str
    parent: str
    tags: dict[str, str]


def run_trial(config: dict[str, Any]) -> None:
    """Tune's entry point. Why a trial cannot reach its last step is told to the board."""
    import ray
    from ray import tune

    task = TrialTask(**config["task"])
    storage = ProjectFolder(Path(task.storage))
    experiment = Experiment(**task.experiment)
    board = progress_actor(task.sweep)
    patience = 60 * experiment.training.patience_minutes
    journal = TrialStatusWriter(
        storage.trial(task.sweep, task.trial), task.trial, experiment.training.steps, task.attempt, board
    )
    store = CheckpointStore.of_trial(storage, task.sweep, task.trial, experiment.training.checkpoints)
    # Whether it can go on from there is for its workers to see; sound weights end a trial that has trained to its last step.
    found, _ = retry(
        lambda: store.newest([EMA]),
        description=f"reading {store.root}",
        timeout=patience,
        log=journal.log,
    )
    state = found.state if found else None
    reported = 0
    for evaluation in state.evaluations if state else []:
        reported = evaluation["step"]
        board.add_evaluation.remote(
            task.trial, reported, {k: v for k, v in evaluation.items() if k != "step"}
        )
        tune.report(evaluation)
    if state is not None and state.step == experiment.training.steps:
        board.update.remote(task.trial, {"step": state.step, "state": TrialState.FINISHED})
        return
    if stop_requested(storage, task.sweep, task.trial):
        journal.set_state(TrialState.STOPPED, step=state.step if state else 0)
        return
    journal.set_state(TrialState.STARTING, step=state.step if state else 0)
    if release_placement_group(storage.trial(task.sweep, task.trial)):
        journal.log("freed what workers of its last start still held")
    tracking = Tracking(TrackingStore(task.tracking_uri), task.tracking_experiment_id)
    run = retry(
        lambda: _open_run(tracking, task, experiment),
        description="opening the run",
        timeout=patience,
        log=journal.log,
        is_transient=is_outage,
    )
    job = TrialJob(
        sweep=task.sweep,
        trial=task.trial,
        experiment=task.experiment,
        data=task.data,
        storage=task.storage,
        tracking_uri=task.tracking_uri,
        run=run,
        attempt=task.attempt,
    )
    fit = _Fit(job, experiment)
    fit.start()
    limit = 60 * experiment.resources.wait_minutes
    while True:
        running = fit.is_alive()
        for evaluation in ray.get(board.evaluations.remote(task.trial, reported)):
            reported = evaluation["step"]
            tune.report(evaluation)
        now = ray.get(board.progress.remote(task.trial))
        asked = now.state.without_workers and stop_requested(storage, task.sweep, task.trial)
        waiting = now.state.without_workers and time.time() - (now.since or 0.0) > limit
        if not running or asked or waiting:
            break
        time.sleep(POLL_SECONDS)
    if fit.lost is not None:
        journal.log(f"the process that watches over its workers was lost: {summarize(fit.lost)}")
        raise fit.lost
    failure = now.failure or fit.failure
    if asked:
        # There are no workers that could hear of it.
        journal.log("asked to stop while it waited for machines")
        journal.set_state(TrialState.STOPPED)
    elif waiting:
        failure = (
            f"no machine for its {experiment.resources.workers} worker(s) came within "
            f"{experiment.resources.wait_minutes:g} min (resources.wait_minutes): add a node, lower resources.workers or set "
            "resources.min_workers; the same command goes on"
        )
    if failure and not now.failure:
        journal.fail(failure, step=now.step)
    ended = "FAILED" if failure else "KILLED" if asked or now.state is TrialState.STOPPED else "FINISHED"
    # A failure is told and not raised: Tune would start the trial again, which is for lost machines alone.
    retry(
        lambda: tracking.finish(run, ended),
        description="closing the run",
        timeout=patience,
        log=journal.log,
        is_transient=is_outage,
    )


class _Fit(threading.Thread):
    """`TorchTrainer.fit` blocks; the trial function meanwhile reports."""

    def __init__(self, job: TrialJob, experiment: Experiment) -> None:
        super().__init__(daemon=True)
        self.job, self.experiment = job, experiment
        self.failure: str | None = None
        self.lost: Exception | None = None
        """Set where Ray Train's controller died; what it watched over died with it."""

    def run(self) -> None:
        from ray.exceptions import RayActorError

        try:
            ray_trainer(self.job, self.experiment).fit()
        except RayActorError as error:
            self.lost = error
        except Exception as error:
            # Ray wraps a worker's exception in its own; the last line of the text names the cause.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.failure = lines[-1] if lines else type(error).__name__


def _open_run(tracking: Tracking, task: TrialTask, experiment: Experiment) -> str:
    return tracking.open_run(
        task.sweep,
        task.trial,
        params=trial_params(experiment),
        tags=task.tags,
        trial=task.trial,
        parent=task.parent,
        dataset=tracked_dataset(task.tags),
    )
