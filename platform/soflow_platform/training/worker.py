"""The loop each Ray Train worker runs for one trial: load, step, log, evaluate, save.

The batch, its times and its noise are functions of (seed, step) and of the position in the global order, drawn for the whole batch
and then split over ranks, so that one worker and N workers train the same network.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from soflow_core.host_copy import HostCopy
from soflow_core.nfe import training_evaluations
from soflow_core.objectives import Batch, Draws
from soflow_core.train_step import StepRecord
from soflow_core.weights import save_weights
from soflow_pipelines.images.encode import encode_png
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError
from soflow_platform.evaluation.evaluator import Evaluator, Interrupted
from soflow_platform.evaluation.ranks import Ranks
from soflow_platform.generation.sampling import SamplingNetwork
from soflow_platform.storage import checkpoints
from soflow_platform.storage.checkpoints import Checkpoint, CheckpointState, CheckpointStore
from soflow_platform.tracking.metric_logger import MetricLogger
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training import distributed
from soflow_platform.training.checkpointer import AsyncCheckpointer
from soflow_platform.training.ema_network import ema_network
from soflow_platform.training.flops import forward_gmac
from soflow_platform.training.job import TrialJob
from soflow_platform.training.model import network_config
from soflow_platform.training.resume import find_resume_point
from soflow_platform.training.step_builder import build_train_step
from soflow_platform.training.step_noise import StepNoisePrefetcher, step_generator
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.stragglers import ForwardTimer
from soflow_platform.training.throughput import Throughput
from soflow_platform.training.trial_status import TrialState, TrialStatusWriter

SEND_SECONDS = 20.0
"""How often gathered metrics are sent between evaluations."""
STOP_SECONDS = 0.5
"""How often rank 0 looks whether it was asked to stop."""


class NonFiniteError(JobError):
    """A loss or gradient that is not finite; the update was not made."""


class TrialWorker:
    """One rank of one trial. Rank 0 logs, saves and reports."""

    def __init__(
        self, job: TrialJob, device: torch.device, rank: int = 0, world: int = 1, board: Any = None
    ) -> None:
        self.job, self.device, self.rank, self.world = job, device, rank, world
        self.experiment = Experiment(**job.experiment)
        self.storage, self.folder = job.project, job.folder
        training = self.experiment.training
        self.checkpoints = CheckpointStore.of_trial(self.storage, job.sweep, job.trial, training.checkpoints)
        self.root = self.checkpoints.root
        self.loader = ShardLoader(
            job.data, batch_size=training.batch, rank=rank, world=world, seed=self.experiment.seed
        )
        self.draws = StepNoisePrefetcher(self._draw)
        self.config = network_config(self.experiment, self.loader.info)
        self.train_step = build_train_step(self.experiment, self.config, device, world, rank)
        # Shares are gathered inside a sharded network's forward pass, so its time says nothing of a rank.
        timed = world > 1 and training.parallel == "ddp"
        self.forward_timer = ForwardTimer(self.train_step.network, device) if timed else None
        self.evaluator = Evaluator.open(
            self.experiment.evaluation,
            self.loader.info,
            job.data,
            self.experiment.data.conditional,
            self.storage,
        )
        self.evaluations: list[dict[str, Any]] = []
        passes = training_evaluations(
            self.experiment.objective, training.batch, self.experiment.data.conditional
        )
        flops = 2e9 * passes * forward_gmac(self.config)
        self.throughput = Throughput(training.batch, training.steps, flops, device, world)
        self.report: TrialStatusWriter | None = None
        self.log: MetricLogger | None = None
        if rank == 0:
            patience = 60 * training.patience_minutes
            self.report = TrialStatusWriter(self.folder, job.trial, training.steps, job.attempt, board)
            self.saver = AsyncCheckpointer(
                self.checkpoints, training.keep_checkpoints, patience, self.report.log
            )
        self._flagged: set[str] = set()
        self._state_copy, self._ema_copy = HostCopy(), HostCopy()
        self._looked = 0.0

    def run(self) -> bool:
        """Train to the last step, or to the step after which a stop was asked for. Returns whether it was the last."""
        training, every = self.experiment.training, self.experiment.evaluation.every
        save_every = training.checkpoint_every or every
        try:
            self._resume()
            stopping = self._owes_evaluation() and not self._evaluate(self.train_step.step)
            while self.train_step.step < training.steps and not stopping:
                step = self.train_step.step + 1
                record = self._step(step)
                self._note(record)
                evaluates = step % every == 0 or step == training.steps
                interrupted = evaluates and not self._evaluate(step)
                stopping = interrupted or (self._stop_asked() and step < training.steps)
                if evaluates or stopping or step % save_every == 0:
                    self._save(step, needed=stopping or step == training.steps)
        except BaseException:
            self._abandon()
            raise
        self._close()
        if self.report is not None:
            self.report.set_state(
                TrialState.STOPPED if stopping else TrialState.FINISHED, step=self.train_step.step
            )
        return not stopping

    def _step(self, step: int) -> StepRecord:
        """One optimizer step. Raises NonFiniteError on every rank where some rank's loss or gradient is not finite."""
        logs = self._logs_at(step)
        if self.forward_timer is not None:
            self.forward_timer.measuring = logs
        self.throughput.begin()
        loaded = next(self.loader)
        self.throughput.loaded()
        batch = Batch(loaded.x0, loaded.labels if self.experiment.data.conditional else None)
        record = self.train_step(batch, self.draws.take(step))
        if not record.finite:
            self._refuse(step, record)
        self.throughput.end(step)
        return record

    def _draw(self, step: int) -> Draws:
        """This rank's rows of a step's draws for the whole batch."""
        experiment = self.experiment
        generator, shape = step_generator(experiment.seed, step), tuple(self.loader.info.shape)
        draws = experiment.objective.draw(
            generator, experiment.training.batch, shape, experiment.data.conditional
        )
        return draws.rows(self.rank, self.world)

    def _refuse(self, step: int, record: StepRecord) -> None:
        told = [(self.rank, str(record.culprit))]
        told = distributed.all_gather_list(told) if self.world > 1 else told
        # The rank whose own loss broke names a term; the others see only what reached them through the gradients.
        rank, culprit = min(told, key=lambda pair: pair[1].startswith("gradient"))
        raise NonFiniteError(
            f"{culprit} is not finite at step {step} on rank {rank}: the update was not made and the "
            f"checkpoints before it are kept in {self.root}."
        )

    def _logs_at(self, step: int) -> bool:
        return step % self.experiment.training.log_every == 0 or step == 1

    def _note(self, record: StepRecord) -> None:
        """Curves and progress of one step; the curves are means over the ranks."""
        step, logs = record.step, self._logs_at(record.step)
        values = {"train/loss": record.loss, **{f"train/{name}": v for name, v in record.terms.items()}}
        if logs and self.world > 1:
            rows = distributed.rows_of(self.rank, self.world, self.experiment.training.batch)
            values = distributed.mean_over_ranks(values, rows)
            slow = self.forward_timer.slow_rank() if self.forward_timer is not None else None
            if slow is not None and self.report is not None:
                self.report.log(
                    f"rank {slow[0]} takes {slow[1]:.1f} times as long as the others for a forward pass", step
                )
        if self.report is None or self.log is None:
            return
        rate = self.throughput.images_per_second
        eta = self.throughput.eta_seconds(step)
        self.report.progress(step, self.loader.consumed, rate, values["train/loss"], eta)
        if logs:
            own = {"train/grad_norm": record.grad_norm, "train/learning_rate": record.learning_rate}
            self.log.log_metrics(step, values | own | self.throughput.take(step))
            self.log.send(every=SEND_SECONDS)

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint, or begin; every rank takes the one that rank 0 found."""
        found = distributed.run_on_rank0(self._open, self.rank, self.world)
        step = found.state.step if found else 0
        if found is not None:
            with found.opened(checkpoints.STATE) as path:
                # From the file to its place: on a GPU there is no room for two of a state.
                state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
                self.train_step.load_state_dict(state)
            self.loader.consumed = found.state.images
            self.evaluations = found.state.evaluations
            if self.log is not None:
                self.log.restore(found.state.pending_metrics)
        else:
            with self._averaged() as (network, _):
                if self.log is not None:
                    self._show(0, self.evaluator.grids(network, self.experiment.objective, self.device))
        if self.report is not None:
            self.report.log(
                f"{'going on' if step else 'starting'} with {self.world} worker(s) on {self.device}", step
            )
            self.report.set_state(TrialState.RUNNING, step=step)

    def _open(self) -> Checkpoint | None:
        """On rank 0: open the run's record and find the newest sound checkpoint. Raises JobError where an outage lasts."""
        assert self.report is not None
        say, patience = self.report.log, 60 * self.experiment.training.patience_minutes
        self.log = MetricLogger(TrackingStore(self.job.tracking_uri), self.job.run, say, patience)
        return find_resume_point(self.checkpoints, self.report, patience, self.loader.info.digest)

    def _owes_evaluation(self) -> bool:
        """Whether the checkpoint that training goes on from was made in the middle of an evaluation."""
        step = self.train_step.step
        told = self.evaluations[-1]["step"] if self.evaluations else 0
        return told < step and step % self.experiment.evaluation.every == 0

    def _evaluate(self, step: int) -> bool:
        """Score the first EMA. All ranks take part, rank 0 records.

        Returns False where a stop came meanwhile: it is scored when training goes on. The last step's evaluation is not interrupted.
        """
        if self.report is not None:
            self.report.set_state(TrialState.EVALUATING, step=step)
        waits = step == self.experiment.training.steps
        try:
            with self._averaged(interruptible=not waits) as (network, ranks):
                result = self.evaluator.evaluate(network, self.experiment.objective, self.device, ranks)
        except Interrupted:
            return False
        if self.report is None or self.log is None:
            return True
        self.evaluations.append({"step": step, **result.metrics})
        self.log.log_metrics(step, result.metrics)
        self.log.send()
        self._show(step, result.grids)
        self.report.evaluation(step, result.metrics)
        for flag in [flag for flag in result.flags if flag not in self._flagged]:
            self._flagged.add(flag)
            self.report.log(flag, step)
            self.log.add_flag(flag)
        return True

    def _averaged(self, interruptible: bool = False) -> AbstractContextManager[tuple[SamplingNetwork, Ranks]]:
        def should_stop() -> bool:
            return interruptible and self._stop_asked()

        return ema_network(self.train_step, self.config, self.device, self.rank, self.world, should_stop)

    def _show(self, step: int, grids: dict[str, Any]) -> None:
        """Sample grids to the run's page and to the trial's folder."""
        for key, image in grids.items():
            if self.log is not None:
                self.log.log_image(step, key, image)
            path = self.folder / "samples" / f"{key.rsplit('/', 1)[-1]}-step-{step:08d}.png"
            try:
                write_bytes(path, encode_png(image))
            except OSError as error:
                # A picture is not worth a trial.
                if self.report is not None:
                    self.report.log(f"{path} cannot be written: {error.strerror}", step)

    def _save(self, step: int, needed: bool) -> None:
        """Copy the state to host memory; rank 0 publishes it while training goes on.

        A checkpoint that is not `needed` is left out while the one before it is stuck.
        """
        sharded = self.train_step.mesh is not None
        if self.rank != 0 and not sharded:
            return
        started = time.perf_counter()
        ready = self.rank != 0 or self.saver.ready(step, needed)
        if not (distributed.broadcast_object(ready) if sharded else ready):
            return
        state = self.train_step.host_state(self._state_copy)
        ema = self.train_step.host_ema_state(copy=self._ema_copy)
        if self.log is None:
            return
        self.log.log_metrics(step, {"system/checkpoint_stall_seconds": time.perf_counter() - started})
        objective, facts = self.experiment.objective, data_facts(self.loader.info, self.experiment)

        def write(folder: Path) -> None:
            torch.save(state, folder / checkpoints.STATE)
            save_weights(folder / checkpoints.EMA, ema, self.config, objective, facts)

        position = CheckpointState(
            step,
            self.loader.consumed,
            self.job.run,
            list(self.evaluations),
            self.log.pending_points(),
            self.loader.info.digest,
        )
        search = self.experiment.search
        ranking = checkpoints.ranked(self.evaluations, search.metric, self.experiment.mode)
        self.saver.submit(position, [evaluation["step"] for evaluation in ranking], write)

    def _stop_asked(self) -> bool:
        """Whether a stop was asked for. All ranks hear the same after the same step, and all raise JobError where rank 0 gives up."""
        failure = self.log.failure if self.log is not None else None
        asked = self.rank == 0 and self._sees_stop()
        if self.world > 1:
            told = distributed.all_reduce_max(2 if failure else int(asked), self.device)
            asked, failure = told == 1, distributed.broadcast_object(failure) if told == 2 else None
        if failure is not None:
            raise failure
        return asked

    def _sees_stop(self) -> bool:
        now = time.monotonic()
        if now - self._looked < STOP_SECONDS:
            return False
        self._looked = now
        asked = stop_requested(self.storage, self.job.sweep, self.job.trial)
        if asked and self.report is not None:
            self.report.log("asked to stop", self.train_step.step)
        return asked

    def _close(self) -> None:
        """Wait until everything is saved and sent. Raises JobError where something cannot be."""
        self.loader.close()
        self.draws.close()
        if self.log is not None:
            self.saver.close()
            self.log.close()

    def _abandon(self) -> None:
        """After a failure: let what is being saved and sent come to its end, without trying again."""
        self.loader.close()
        self.draws.close()
        if self.report is not None:
            self.saver.abandon()
        if self.log is not None:
            self.log.abandon()


def data_facts(info: DatasetInfo, experiment: Experiment) -> dict[str, Any]:
    """What a user of the weights must know of the data they were trained on."""
    return {**asdict(info), "conditional": experiment.data.conditional}
