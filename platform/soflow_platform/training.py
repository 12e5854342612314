"""The loop each Ray Train worker runs for one trial: load, step, log, evaluate, save.

The batch, its times and its noise are functions of (seed, step) and of the position in the global order, drawn for the whole batch
and then split over ranks, so that one worker and N workers train the same network.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from soflow_core.checkpoints import save_weights
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Batch, Objective
from soflow_core.training import StepRecord, TrainStep
from soflow_pipelines.loader import ShardLoader
from soflow_pipelines.shards import DatasetInfo
from soflow_pipelines.writers import encode_png, write_file
from soflow_platform import checkpoints
from soflow_platform.checkpoints import Checkpoint, Position
from soflow_platform.config.experiment import Experiment
from soflow_platform.data import network_config
from soflow_platform.errors import JobError
from soflow_platform.evaluation import Evaluation, Evaluator
from soflow_platform.storage import Storage
from soflow_platform.tracking import RunLog

PROGRESS_SECONDS = 0.5
"""How often a worker tells the terminal where it is."""
LOG_SECONDS = 20.0
"""How often gathered metrics are sent between evaluations."""


@dataclass(frozen=True)
class TrialJob:
    """What a worker must know; plain data, so that it travels to any node."""

    sweep: str
    trial: str
    experiment: dict[str, Any]
    data: str
    storage: str
    tracking_uri: str
    run: str

    def settings(self) -> dict[str, Any]:
        return asdict(self)


class NonFiniteError(JobError):
    """A loss or gradient that is not finite; the update was not made."""


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one optimizer step: a function of (seed, step), so that a checkpoint needs no generator state."""
    digest = hashlib.sha256(f"step {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def build_train_step(
    experiment: Experiment, config: DiTConfig, device: torch.device, world: int
) -> TrainStep:
    """Network with weights drawn from the seed, optimizer and EMAs; wrapped for several ranks."""
    torch.manual_seed(experiment.seed)
    network: nn.Module = DiT(config).to(device)
    if world > 1 and not experiment.objective.uses_jvp:
        network = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
    training = experiment.training
    return TrainStep(
        network,
        experiment.objective,
        experiment.optimizer,
        total_steps=training.steps,
        ema_decays=training.ema,
        precision=training.precision,
        clip_norm=training.clip_norm,
        compile=training.compile,
        reduce_gradients=average_gradients if world > 1 and experiment.objective.uses_jvp else None,
    )


def average_gradients(gradients: list[torch.Tensor]) -> None:
    """Mean over ranks, in place, in one message."""
    flat = torch._utils._flatten_dense_tensors(gradients)
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(mean)


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point on every worker: train one trial from its newest checkpoint to its last step."""
    import ray
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    # Ray gives a worker one OpenMP thread; the CPUs it was granted are the threads it may use.
    granted = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    torch.set_num_threads(max(1, int(granted)))
    worker = TrialWorker(
        TrialJob(**settings),
        device=ray.train.torch.get_device(),
        rank=context.get_world_rank(),
        world=context.get_world_size(),
    )
    worker.board = ray.get_actor(f"progress-{worker.job.sweep}")
    try:
        worker.run()
    except NonFiniteError as error:
        # Training again from the checkpoint would only meet the same numbers: tell, and do not ask for a restart.
        ray.get(worker.board.update.remote(worker.job.trial, {"failure": str(error)}))


class TrialWorker:
    """One rank of one trial. Rank 0 logs, saves and reports."""

    def __init__(self, job: TrialJob, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.job, self.device, self.rank, self.world = job, device, rank, world
        self.board: Any = None
        self.experiment = Experiment(**job.experiment)
        self.storage = Storage(Path(job.storage))
        self.root = self.storage.trial(job.sweep, job.trial) / "checkpoints"
        training = self.experiment.training
        self.loader = ShardLoader(
            job.data, batch_size=training.batch, rank=rank, world=world, seed=self.experiment.seed
        )
        self.config = network_config(self.experiment, self.loader.info)
        self.train_step = build_train_step(self.experiment, self.config, device, world)
        self.evaluator = Evaluator.open(
            self.experiment.evaluation,
            self.loader.info,
            job.data,
            self.experiment.data.conditional,
            self.storage,
        )
        self.evaluations: list[dict[str, Any]] = []
        self.log = RunLog.resume(job.tracking_uri, job.run) if rank == 0 else None
        self._last_progress = self._last_log = time.monotonic()

    def run(self) -> None:
        """Train to the last step."""
        self._resume()
        objective: Objective = self.experiment.objective
        training, evaluation = self.experiment.training, self.experiment.evaluation
        shape, conditional = tuple(self.loader.info.shape), self.experiment.data.conditional
        save_every = training.checkpoint_every or evaluation.every
        started = time.monotonic()
        for step in range(self.train_step.step + 1, training.steps + 1):
            loaded = next(self.loader)
            waited = time.monotonic() - started
            draws = objective.draw(
                step_generator(self.experiment.seed, step), training.batch, shape, conditional
            )
            batch = Batch(loaded.x0, loaded.labels if conditional else None)
            record = self.train_step(batch, draws.rows(self.rank, self.world))
            if not record.finite:
                raise NonFiniteError(
                    f"{record.culprit} is not finite at step {step} on rank {self.rank}: the update was not made and the "
                    f"checkpoints before it are kept in {self.root}."
                )
            self._note(record, time.monotonic() - started, waited)
            last = step == training.steps
            scored = step % evaluation.every == 0 or last
            if scored:
                self._evaluate(step)
            if scored or step % save_every == 0:
                self._save(step)
            started = time.monotonic()

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint; every rank reads the same one."""
        found, damaged = checkpoints.newest(self.root)
        for sentence in damaged:
            self._tell(state=sentence)
        if found is not None:
            self.train_step.load_state_dict(
                torch.load(found.state, map_location=self.device, weights_only=True)
            )
            self.loader.consumed = found.position.images
            self.evaluations = found.position.evaluations
        elif self.log is not None:
            self._show(0, self.evaluator.grids(self._ema_network(), self.experiment.objective, self.device))
        self._tell(step=self.train_step.step, state="running")

    def _note(self, record: StepRecord, seconds: float, waited: float) -> None:
        """Curves and progress of one step."""
        if self.log is None:
            return
        rate = self.experiment.training.batch / seconds
        now = time.monotonic()
        if record.step % self.experiment.training.log_every == 0 or record.step == 1:
            terms = {f"train/{name}": value for name, value in record.terms.items()}
            own = {"train/loss": record.loss, "train/grad_norm": record.grad_norm}
            system = {
                "system/images_per_second": rate,
                "system/data_wait_share": waited / seconds,
                "system/images_seen": float(self.loader.consumed),
            }
            self.log.metrics(record.step, terms | own | system)
        if now - self._last_log > LOG_SECONDS:
            self._last_log = now
            self.log.flush()
        if now - self._last_progress > PROGRESS_SECONDS:
            self._last_progress = now
            self._tell(step=record.step, images_per_second=rate, loss=record.loss, state="running")

    def _evaluate(self, step: int) -> None:
        """Score the first EMA. All ranks take part, rank 0 records."""
        self._tell(step=step, state="evaluating")
        result = self._scores()
        if self.log is None:
            return
        self.evaluations.append({"step": step, **result.metrics})
        self.log.metrics(step, result.metrics)
        self.log.flush()
        self._show(step, result.grids)
        if self.board is not None:
            self.board.add_evaluation.remote(self.job.trial, step, result.metrics)

    def _scores(self) -> Evaluation:
        merge = gather if self.world > 1 else list
        objective = self.experiment.objective
        return self.evaluator.evaluate(
            self._ema_network(), objective, self.device, self.rank, self.world, merge
        )

    def _ema_network(self) -> DiT:
        network = DiT(self.config).to(self.device).eval()
        network.load_state_dict(self.train_step.ema_state())
        return network

    def _show(self, step: int, grids: dict[str, Any]) -> None:
        """Sample grids to the run's page and to the trial's folder."""
        folder = self.root.parent / "samples"
        for key, image in grids.items():
            if self.log is not None:
                self.log.grid(step, key, image)
            write_file(folder / f"{key.rsplit('/', 1)[-1]}-step-{step:08d}.png", encode_png(image))

    def _save(self, step: int) -> None:
        if self.rank == 0:
            position = Position(step, self.loader.consumed, self.job.run, self.evaluations)
            checkpoints.publish(self.root, position, self._write)
            search = self.experiment.search
            best = checkpoints.best_evaluation(self.evaluations, search.metric, self.experiment.mode)
            keep = self.experiment.training.keep_checkpoints
            checkpoints.prune(self.root, keep, best["step"] if best else None)
        if self.world > 1:
            dist.barrier()

    def _write(self, folder: Path) -> None:
        torch.save(self.train_step.state_dict(), folder / checkpoints.STATE)
        save_weights(
            folder / checkpoints.EMA,
            self.train_step.ema_state(),
            self.config,
            self.experiment.objective,
            data_facts(self.loader.info, self.experiment),
        )

    def _tell(self, **changes: Any) -> None:
        if self.rank == 0 and self.board is not None:
            self.board.update.remote(self.job.trial, changes)


def data_facts(info: DatasetInfo, experiment: Experiment) -> dict[str, Any]:
    """What a user of the weights must know of the data they were trained on."""
    return {**asdict(info), "conditional": experiment.data.conditional}


def gather(items: list[Any]) -> list[Any]:
    """Every rank's items, in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def latest_position(storage: Storage, sweep: str, trial: str) -> Position | None:
    """Where a trial stands on disk; None before its first checkpoint."""
    found, _ = checkpoints.newest(storage.trial(sweep, trial) / "checkpoints")
    return found.position if found else None


def scored_checkpoint(storage: Storage, sweep: str, trial: str, step: int) -> Checkpoint | None:
    """The checkpoint of one step of a trial."""
    root = storage.trial(sweep, trial) / "checkpoints"
    return next((c for c in checkpoints.published(root) if c.position.step == step), None)
