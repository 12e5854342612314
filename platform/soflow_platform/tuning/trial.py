"""One trial under Tune: trained in this process, or by a Ray Train run that is watched here; its evaluations go to the scheduler.

A trial that was interrupted first reports the evaluations in its newest checkpoint again, so that a scheduler and a search algorithm
that start anew have all of them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from soflow_core.failures import InputError, printable, summarize
from soflow_platform.cluster.placement import release_placement_group
from soflow_platform.config.experiment import Experiment, trial_params
from soflow_platform.storage.checkpoints import EMA, CheckpointState, CheckpointStore
from soflow_platform.storage.retry import is_storage_outage, retry
from soflow_platform.tracking.outages import is_outage
from soflow_platform.tracking.store import Tracking, TrackingStore, tracked_dataset
from soflow_platform.training.failure import Failure
from soflow_platform.training.job import TrialJob
from soflow_platform.training.launch import ray_trainer, release_memory, train_here
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_status import (
    FAILURE,
    TrialState,
    TrialStatus,
    TrialStatusWriter,
    progress_actor,
    read_status,
)
from soflow_platform.tuning.record import ScoredStep

T = TypeVar("T")

RUNG_STEP = "rung_step"
"""Name of a result's step on the scale of the sweep's own steps: trials of other lengths are compared at equal shares k / K."""
POLL_SECONDS = 0.5
WAITING_SECONDS = 45.0
"""How long a trial may take to get its workers before it is said that it waits."""


@dataclass(frozen=True)
class TrialTask:
    """What Tune passes to a trial: plain data."""

    job: TrialJob
    tracking_experiment_id: str
    parent: str
    """MLflow id of the sweep's run."""
    tags: dict[str, str]
    """Tags of the trial's run."""
    name: str
    """Name of the trial's run."""
    rung_steps: int | None = None
    """Steps of the sweep's own settings, by which its scheduler places rungs; None: those of the trial."""

    @classmethod
    def of(cls, content: dict[str, Any]) -> TrialTask:
        """From the form that Tune passes on."""
        return cls(**{**content, "job": TrialJob(**content["job"])})

    def as_config(self) -> dict[str, Any]:
        return asdict(self)


class EndKind(Enum):
    """Why a trial's Ray Train run is not watched any longer."""

    COMPLETED = "its workers ended"
    FAILED = "it cannot go on"
    STOPPED = "it was asked to stop while it had no workers"
    NO_MACHINES = "no machines came in time"
    CONTROLLER_LOST = "Ray Train's controller died"


@dataclass(frozen=True)
class TrialEnd:
    """How a trial's Ray Train run ended."""

    kind: EndKind
    status: TrialStatus
    """The last status in the progress actor."""
    failure: str | None = None
    """A sentence, where it failed."""
    traceback: str | None = None
    """That of Ray Train's error, where it has one."""
    own_fault: bool = False
    """Whether the trial itself is at fault for it."""
    error: Exception | None = None
    """The error of Ray Train's controller, where it died."""


class TrialDriver:
    """Runs one trial from its newest checkpoint."""

    def __init__(self, task: TrialTask) -> None:
        self.task, self.job = task, task.job
        self.project, self.folder = self.job.project, self.job.folder
        self.experiment = Experiment(**self.job.experiment)
        self.steps = self.experiment.training.steps
        self.end = min(self.job.until or self.steps, self.steps)
        """The step at which this start ends: the last one, or a rung of its population."""
        self.actor = progress_actor(self.job.sweep)
        self.status = TrialStatusWriter(self.folder, self.job.trial, self.steps, self.job.attempt, self.actor)
        self.tracking = Tracking(TrackingStore(self.job.tracking_uri), task.tracking_experiment_id)
        self.reported = 0
        """The step of the last evaluation that Tune has."""

    def result(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        """An evaluation as Tune gets it."""
        step = evaluation["step"]
        at = rung_step(step, self.steps, self.task.rung_steps or self.steps)
        return {**evaluation, RUNG_STEP: at, "done": step == self.end}

    def run(self) -> Generator[dict[str, Any], None, None]:
        """Train to the last step, to its rung, or until the trial is stopped or fails; yields its evaluations in order, each once.

        That of the last step is yielded when everything is saved and closed. Closing the iterator ends the trial as pruned. Raises
        what ends the training. Where another start would not help, the progress actor, the status file and the trial's run have the
        reason; else Tune starts the trial again, which helps against lost machines and processes.
        """
        if self._has_failed():
            # Tune has started it again, in a new process, for trials that follow.
            return
        with closing(self._train()) as evaluations:
            for evaluation in evaluations:
                if evaluation["step"] > self.reported:
                    self.reported = evaluation["step"]
                    yield evaluation

    def _train(self) -> Generator[dict[str, Any], None, None]:
        state = self.restore()
        step = state.step if state else 0
        finished = step == self.steps
        if finished:
            self.actor.update.remote(self.job.trial, {"step": step, "state": TrialState.FINISHED})
        yield from state.evaluations if state else []
        if finished:
            return
        if state is not None and state.ended is not None:
            self.status.set_state(TrialState.PRUNED, step=step)
            return
        if self._stop_requested():
            self.status.set_state(TrialState.STOPPED, step=step)
            return
        self.status.set_state(TrialState.STARTING, step=step)
        run = self._retry(self._open_run, "opening the run", is_outage)
        job = replace(self.job, run=run)
        if self.experiment.resources.in_process:
            yield from self.train_in_process(job)
        else:
            yield from self.train_in_group(job)

    def _has_failed(self) -> bool:
        """Whether the trial has failed in this attempt of its sweep, for a reason that another start would not change."""
        import ray

        if ray.get(self.actor.progress.remote(self.job.trial)).failure:
            return True
        with suppress(OSError, InputError):
            status = read_status(self.folder)
            return status is not None and status.attempt == self.job.attempt and status.failure is not None
        return False

    def restore(self) -> CheckpointState | None:
        """The state of the newest checkpoint with sound weights."""
        store = CheckpointStore.of_trial(
            self.project, self.job.sweep, self.job.trial, self.experiment.training.checkpoints
        )
        # Sound weights are enough for a trial that has trained to its last step; the rest is verified by the workers that resume.
        checkpoint, _ = self._retry(lambda: store.newest([EMA]), f"reading {store.root}", is_storage_outage)
        if checkpoint is None:
            return None
        for evaluation in checkpoint.state.evaluations:
            scored = ScoredStep.of(evaluation)
            self.actor.add_evaluation.remote(self.job.trial, scored.step, scored.metrics)
        return checkpoint.state

    def train_in_process(self, job: TrialJob) -> Iterator[dict[str, Any]]:
        """Train in this process."""
        last: list[dict[str, Any]] = []
        try:
            with closing(train_here(job, self.experiment, self.actor)) as evaluations:
                for evaluation in evaluations:
                    if evaluation["step"] == self.end:
                        last = [evaluation]
                    else:
                        yield evaluation
        except Exception:
            if self._has_failed():
                self._close_run(job.run, "FAILED")
            raise
        finally:
            release_memory()
        if not last or self.end == self.steps:
            # At a rung the run stays open: the trial goes on when its population has reached it.
            self._close_run(job.run, "FINISHED" if last else "KILLED")
        yield from last

    def train_in_group(self, job: TrialJob) -> Iterator[dict[str, Any]]:
        """Train in a group of Ray Train workers."""
        import ray

        if release_placement_group(self.folder):
            self.status.log("released the machines that workers of its last start still held")
        end = yield from self.supervise(TrainThread(self.experiment, job))
        self.close(job.run, end)
        yield from ray.get(self.actor.evaluations.remote(self.job.trial, self.reported))

    def supervise(self, train: TrainThread) -> Generator[dict[str, Any], None, TrialEnd]:
        """Yield evaluations, but that of the last step, while the Ray Train run lasts; returns how it ended."""
        import ray

        train.start()
        status, since, said = TrialStatus(), math.inf, False
        while True:
            # Before the last look at the progress actor, which then has all that the workers sent.
            running = train.is_alive()
            for evaluation in ray.get(self.actor.evaluations.remote(self.job.trial, self.reported)):
                if evaluation["step"] < self.end:
                    yield evaluation
            told = ray.get(self.actor.progress.remote(self.job.trial))
            # An actor whose process died has no state until workers send theirs, and they may be what is waited for.
            status = status if told.since is None else told
            if train.lost is not None:
                return TrialEnd(EndKind.CONTROLLER_LOST, status, error=train.lost)
            failure = status.failure or (train.failure.sentence if train.failure else None)
            waits = status.state.without_workers
            if waits and self._stop_requested():
                return TrialEnd(EndKind.STOPPED, status, failure)
            # By this process's own clock: that of its machine, or of the actor's, may be set, and two of them differ.
            since, said = (min(since, time.monotonic()), said) if waits else (math.inf, False)
            waited = time.monotonic() - since
            if waited > WAITING_SECONDS and status.trouble is None and not said:
                said = True
                self.actor.update.remote(self.job.trial, {"trouble": self._waits()})
            if waited > 60 * self.experiment.resources.wait_minutes:
                return TrialEnd(EndKind.NO_MACHINES, status, status.failure or self._no_machines())
            if not running:
                trace = train.failure.traceback if train.failure else None
                own = train.failure is not None and train.failure.own_fault
                return TrialEnd(EndKind.FAILED if failure else EndKind.COMPLETED, status, failure, trace, own)
            time.sleep(POLL_SECONDS)

    def close(self, run: str, end: TrialEnd) -> None:
        """Publish how the trial ended and close its run. Raises the controller's error where that died."""
        if end.error is not None:
            self.status.log(f"Ray Train's controller was lost: {summarize(end.error)}")
            raise end.error
        if end.kind is EndKind.STOPPED:
            # It has no workers that could see the request.
            self.status.log("asked to stop while it waited for machines")
            self.status.set_state(TrialState.STOPPED)
        if end.failure and not end.status.failure:
            self.status.fail(
                end.failure, step=end.status.step, traceback=end.traceback, own_fault=end.own_fault
            )
        stopped = end.kind is EndKind.STOPPED or end.status.state is TrialState.STOPPED
        state = "FAILED" if end.failure else "KILLED" if stopped else "FINISHED"
        if state == "FINISHED" and self.end < self.steps and end.status.state is TrialState.WAITING:
            # At a rung the run stays open.
            return
        # A failure is not raised: Tune would start the trial again, which helps against lost machines alone.
        self._close_run(run, state)

    def _close_run(self, run: str, state: str) -> None:
        def close() -> None:
            if state == "FAILED":
                self._log_failure(run)
            self.tracking.finish(run, state)

        self._retry(close, "closing the run", is_outage)

    def _log_failure(self, run: str) -> None:
        with suppress(FileNotFoundError, InputError):
            status = read_status(self.folder)
            if status is not None and status.failure:
                text = (self.folder / FAILURE).read_text(encoding="utf-8")
                self.tracking.log_failure(run, status.failure, text)

    def _stop_requested(self) -> bool:
        return stop_requested(self.project, self.job.sweep, self.job.trial)

    def _waits(self) -> str:
        resources = self.experiment.resources
        text = (
            f"waits for machines: {resources.workers} worker(s) of {resources.cpus_per_worker:g} CPU and "
            f"{resources.gpus_per_worker:g} GPU, at most {resources.wait_minutes:g} min (resources.wait_minutes)"
        )
        self.status.log(text)
        return text

    def _no_machines(self) -> str:
        resources = self.experiment.resources
        return (
            f"no machine for its {resources.workers} worker(s) came within {resources.wait_minutes:g} min (resources.wait_minutes): "
            "add a node, lower resources.workers or set resources.min_workers; the same command goes on"
        )

    def _open_run(self) -> str:
        return self.tracking.open_run(
            self.job.sweep,
            self.task.name,
            params=trial_params(self.experiment),
            tags=self.task.tags,
            trial=self.job.trial,
            parent=self.task.parent,
            dataset=tracked_dataset(self.task.tags),
        )

    def _retry(
        self, action: Callable[[], T], description: str, is_transient: Callable[[Exception], bool]
    ) -> T:
        return retry(
            action,
            description=description,
            timeout=60 * self.experiment.training.patience_minutes,
            log=self.status.log,
            is_transient=is_transient,
        )


def rung_step(step: int, steps: int, total: int) -> float:
    """The step of a training of `total` steps at the share of it that `step` is of `steps`; whole where it is whole."""
    return round(step * total / steps, 6)


class TrainThread(threading.Thread):
    """Runs `TorchTrainer.fit`, which blocks, while its evaluations are reported."""

    def __init__(self, experiment: Experiment, job: TrialJob) -> None:
        super().__init__(daemon=True)
        self.experiment, self.job = experiment, job
        self.failure: Failure | None = None
        self.lost: Exception | None = None
        """Set where Ray Train's controller died; its workers died with it."""

    def run(self) -> None:
        from ray.exceptions import RayActorError

        try:
            ray_trainer(self.job, self.experiment).fit()
        except RayActorError as error:
            self.lost = error
        except Exception as error:
            # Ray wraps a worker's exception in its own; the last line of the text names the cause.
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            sentence = printable(lines[-1]) if lines else type(error).__name__
            self.failure = Failure.of_text(sentence, str(error))
