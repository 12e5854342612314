"""Output of a trial during training: status, log, metrics, sample grids, checkpoints.

Rank 0 writes with `RankZeroIO`; the other ranks have a `NullIO`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from soflow_pipelines.images.encode import encode_png
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import Checkpoint, CheckpointState, WriteFiles, ranked
from soflow_platform.storage.code_digest import running_code
from soflow_platform.tracking.metric_logger import MetricLogger
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training.checkpointer import AsyncCheckpointer
from soflow_platform.training.failure import Failure
from soflow_platform.training.resume import find_resume_point
from soflow_platform.training.setup import TrialSetup
from soflow_platform.training.start import Start
from soflow_platform.training.stop_request import last_save_request, stop_requested
from soflow_platform.training.trial_status import TrialState, TrialStatusWriter

if TYPE_CHECKING:
    import numpy as np

    from soflow_platform.evaluation.evaluator import Evaluation

SEND_SECONDS = 20.0
"""Interval at which buffered metrics are sent between evaluations."""
STOP_SECONDS = 0.5
"""Interval at which the stop request is checked."""


class TrialIO(Protocol):
    """Interface through which the training loop reports, logs and saves."""

    @property
    def failure(self) -> JobError | None:
        """Why metrics can no longer be logged; None while they can."""

    def open(self, data: str) -> Checkpoint | None:
        """Open the metrics and return the checkpoint to resume from; None where training starts from step 0.

        `data` is the digest of the training data. Raises JobError where an outage lasts.
        """

    def log(self, text: str, step: int | None = None) -> None:
        """Append a line to the trial's log."""

    def set_state(self, state: TrialState, step: int) -> None:
        """Publish a change of state."""

    def progress(self, step: int, images: int, rate: float, loss: float, eta_seconds: float | None) -> None:
        """Publish the progress after a step; `rate` is in images per second."""

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""

    def evaluated(self, step: int, result: Evaluation) -> None:
        """Log and publish an evaluation."""

    def show(self, step: int, grids: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Log sample grids to MLflow and write them to the trial's folder."""

    def ready_to_save(self, step: int, needed: bool) -> bool:
        """Wait until a checkpoint can be made. Returns False where one that is not `needed` is to be left out."""

    def save(self, progress: CheckpointState, write: WriteFiles) -> None:
        """Publish, in the background, the checkpoint of `progress` whose files `write` writes."""

    def stop_requested(self, step: int) -> bool:
        """Whether the trial was asked to stop."""

    def save_requested(self, step: int) -> bool:
        """Whether the trial was asked to save since this was called last."""

    def fail(self, failure: Failure) -> None:
        """Publish why the trial failed."""

    def close(self) -> None:
        """Wait until everything is saved and sent. Raises JobError where that fails."""

    def abandon(self) -> None:
        """End the background threads after a failure, without retries."""


class NullIO:
    """Does nothing: for ranks other than 0."""

    failure = None

    def open(self, data: str) -> Checkpoint | None:
        del data
        return None

    def log(self, text: str, step: int | None = None) -> None:
        pass

    def set_state(self, state: TrialState, step: int) -> None:
        pass

    def progress(self, step: int, images: int, rate: float, loss: float, eta_seconds: float | None) -> None:
        pass

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def evaluated(self, step: int, result: Evaluation) -> None:
        pass

    def show(self, step: int, grids: Mapping[str, np.ndarray[Any, Any]]) -> None:
        pass

    def ready_to_save(self, step: int, needed: bool) -> bool:
        del step, needed
        return True

    def save(self, progress: CheckpointState, write: WriteFiles) -> None:
        pass

    def stop_requested(self, step: int) -> bool:
        del step
        return False

    def save_requested(self, step: int) -> bool:
        del step
        return False

    def fail(self, failure: Failure) -> None:
        pass

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class RankZeroIO:
    """Writes the status file, log, progress actor, MLflow metrics and checkpoints: for rank 0."""

    def __init__(self, setup: TrialSetup, actor: Any = None) -> None:
        """`actor` is the sweep's progress actor, if there is one."""
        job, training = setup.job, setup.experiment.training
        self.job, self.experiment = job, setup.experiment
        self.patience = 60 * training.patience_minutes
        """Seconds for which a failed operation is retried."""
        self.checkpoints = setup.checkpoints
        self.status = TrialStatusWriter(job.folder, job.trial, training.steps, job.attempt, actor)
        self.checkpointer = AsyncCheckpointer(
            self.checkpoints,
            training.keep_checkpoints,
            self.patience,
            self.status.log,
            partial(self.status.report, "checkpoints"),
        )
        self.metrics = MetricLogger(
            TrackingStore(job.tracking_uri),
            job.run,
            self.status.log,
            self.patience,
            partial(self.status.report, "curves"),
        )
        self._lineage = None if job.start is None else Start(**job.start).lineage
        self._data: str | None = None
        self._flagged: set[str] = set()
        self._looked = self._saved_at = 0.0
        self._save_request = last_save_request(job.project, job.sweep)

    @property
    def failure(self) -> JobError | None:
        return self.metrics.failure

    def open(self, data: str) -> Checkpoint | None:
        self._data = data
        self.metrics.resume()
        checkpoint = find_resume_point(self.checkpoints, self.status, self.patience, data)
        if checkpoint is not None:
            self.metrics.restore(checkpoint.state.pending_metrics)
        return checkpoint

    def log(self, text: str, step: int | None = None) -> None:
        self.status.log(text, step)

    def set_state(self, state: TrialState, step: int) -> None:
        self.status.set_state(state, step=step)

    def progress(self, step: int, images: int, rate: float, loss: float, eta_seconds: float | None) -> None:
        self.status.progress(step, images, rate, loss, eta_seconds)

    def log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.metrics.log_metrics(step, values)
        self.metrics.send(every=SEND_SECONDS)

    def evaluated(self, step: int, result: Evaluation) -> None:
        self.metrics.log_metrics(step, result.metrics)
        self.metrics.send()
        self.show(step, result.grids)
        self.status.evaluation(step, result.metrics)
        for flag in result.flags:
            if flag not in self._flagged:
                self._flagged.add(flag)
                self.status.log(flag, step)
                self.metrics.add_flag(flag)

    def show(self, step: int, grids: Mapping[str, np.ndarray[Any, Any]]) -> None:
        for key, image in grids.items():
            self.metrics.log_image(step, key, image)
            path = self.job.folder / "samples" / f"{key.rsplit('/', 1)[-1]}-step-{step:08d}.png"
            try:
                write_bytes(path, encode_png(image))
            except OSError as error:
                # A grid that cannot be written does not fail the trial.
                self.status.log(f"{path} cannot be written: {error.strerror}", step)

    def ready_to_save(self, step: int, needed: bool) -> bool:
        return self.checkpointer.ready(step, needed)

    def save(self, progress: CheckpointState, write: WriteFiles) -> None:
        scored = [dict(evaluation) for evaluation in progress.evaluations]
        state = replace(
            progress,
            evaluations=scored,
            pending_metrics=self.metrics.pending_points(),
            data=self._data,
            code=running_code().digest,
            start=self._lineage,
        )
        ranking = ranked(scored, self.experiment.search.metric, self.experiment.mode)
        self.checkpointer.submit(state, [evaluation["step"] for evaluation in ranking], write)

    def stop_requested(self, step: int) -> bool:
        now = time.monotonic()
        if now - self._looked < STOP_SECONDS:
            return False
        self._looked = now
        requested = stop_requested(self.job.project, self.job.sweep, self.job.trial)
        if requested:
            self.status.log("asked to stop", step)
        return requested

    def save_requested(self, step: int) -> bool:
        if self._looked == self._saved_at:
            return False
        self._saved_at = self._looked
        newest = last_save_request(self.job.project, self.job.sweep)
        if newest == self._save_request:
            return False
        self._save_request = newest
        self.status.log("asked to save: a machine is to be lost", step)
        return True

    def fail(self, failure: Failure) -> None:
        self.status.fail(failure.sentence, traceback=failure.traceback, own_fault=failure.own_fault)

    def close(self) -> None:
        self.checkpointer.close()
        self.metrics.close()

    def abandon(self) -> None:
        self.checkpointer.abandon()
        self.metrics.abandon()
