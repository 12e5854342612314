"""Trains a trial in this process, or in a group of Ray Train workers.

What this module imports is light: torch and the training loop are imported where a trial is trained.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import secrets
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soflow_core.failures import InputError, printable
from soflow_platform.cluster.placement import record_placement_group
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError
from soflow_platform.training.failure import Failure, another_start_may_help
from soflow_platform.training.job import TrialJob
from soflow_platform.training.memory_pieces import with_more_pieces, with_pieces
from soflow_platform.training.trial_log import LOG, TrialLog
from soflow_platform.training.trial_status import (
    TrialState,
    TrialStatus,
    TrialStatusWriter,
    progress_actor,
    read_status,
)

if TYPE_CHECKING:
    from ray.train import ScalingConfig, UserCallback
    from ray.train.torch import TorchTrainer

    from soflow_platform.training.worker import Trainer

RANK_TIMEOUT_SECONDS = 1800
"""How long a rank waits for the others before it takes them for lost, beside the time in which rank 0 may wait out outages."""
OUTAGES_AT_ONCE = 3
"""Outages that rank 0 may wait out, one after the other, while the other ranks wait for it."""


def train_here(job: TrialJob, experiment: Experiment, actor: Any) -> Generator[dict[str, Any], None, None]:
    """Train a trial of one worker in this process; yields its evaluations as `Trainer.train` does.

    Other trials may have been trained in the process before: nothing that they leave behind decides a number. `actor` is the sweep's
    progress actor. Raises what ends the trial; where another start would not help, the reason and its traceback are published.
    """
    import torch

    from soflow_platform.training.worker import Trainer

    configure_torch(experiment.resources.cpus_per_worker)
    _reset_peak_memory()
    device = torch.device("cuda" if experiment.resources.gpus_per_worker else "cpu")
    trainer: Trainer | None = None
    following: TrialJob | None = with_pieces(job)
    while following is not None:
        job = following
        try:
            trainer = Trainer.of_job(job, device, actor=actor)
            yield from trainer.train()
            return
        except Exception as error:
            following = None if trainer is not None and trainer.scoring else with_more_pieces(job, error)
            if following is None:
                if not another_start_may_help(error):
                    _publish_failure(error, job, trainer, actor)
                raise
        # Here, where the error no longer holds on to the frames of the step.
        trainer = None
        release_memory()


def _publish_failure(error: Exception, job: TrialJob, trainer: Trainer | None, actor: Any) -> None:
    """Publish why a trial cannot go on: training again from the checkpoint would only meet the same."""
    failure = Failure.of(error)
    logging.getLogger(__name__).error("%s", failure.sentence)
    if trainer is not None:
        trainer.io.fail(failure)
    else:
        fail_trial(job, actor, failure)


def release_memory() -> None:
    """Free what a trial that has ended left in this process: tensors in reference cycles, compiled graphs, the GPU's cache."""
    if "torch" not in sys.modules:
        return
    import torch

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def configure_torch(cpus: float) -> None:
    """Set this process's threads to the CPUs that a worker was granted, and cuBLAS to deterministic algorithms."""
    import torch

    # Ray gives a worker one OpenMP thread; the CPUs it was granted are the threads it may use.
    torch.set_num_threads(max(1, int(cpus)))
    # cuBLAS is deterministic only with this, and reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _reset_peak_memory() -> None:
    """Let the process's peak memory, which trials log, begin anew."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def ray_trainer(job: TrialJob, experiment: Experiment) -> TorchTrainer:
    """A Ray Train run of the trial; its `fit()` blocks until the trial has ended, and restarts lost workers."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    patience = 60 * experiment.training.patience_minutes
    return TorchTrainer(
        train_worker,
        train_loop_config=job.as_dict(),
        torch_config=TorchConfig(timeout_s=int(RANK_TIMEOUT_SECONDS + OUTAGES_AT_ONCE * patience)),
        scaling_config=_scaling(experiment),
        run_config=RunConfig(
            # Ray Train would go on with a run of the same name, and with what it remembers of its workers.
            name=f"{job.trial}-{secrets.token_hex(4)}",
            storage_path=str(job.project.sweep(job.sweep) / "train"),
            failure_config=FailureConfig(max_failures=experiment.resources.max_failures),
            callbacks=[_on_lost_workers(job)],
            logging_config=LoggingConfig("ERROR"),
        ),
    )


def _scaling(experiment: Experiment) -> ScalingConfig:
    from ray.train import ScalingConfig

    resources = experiment.resources
    each = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        each["GPU"] = resources.gpus_per_worker
    elastic = resources.min_workers is not None
    return ScalingConfig(
        num_workers=(resources.min_workers, resources.workers) if elastic else resources.workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=each,
    )


def _on_lost_workers(job: TrialJob) -> UserCallback:
    """Tells the progress actor and the trial's log that workers failed and why, from Ray Train's controller."""
    from ray.train import UserCallback

    class LostWorkers(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            del run_context
            ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
            reasons = dict.fromkeys(_last_line(error) for _, error in sorted(worker_exceptions.items()))
            with contextlib.suppress(OSError):
                TrialLog(job.folder / LOG).write(f"worker(s) {ranks} failed: {'; '.join(reasons)}")
            changes = {"state": TrialState.RESTARTING, "lost": f"worker(s) {ranks}"}
            progress_actor(job.sweep).update.remote(job.trial, changes)

    return LostWorkers()


def _last_line(error: Exception) -> str:
    """The line that names the cause: Ray wraps a worker's exception in its own, with the traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1]) if lines else type(error).__name__


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point in every worker: train one trial from its newest checkpoint to its last step."""
    import ray
    import ray.train
    import ray.train.torch

    from soflow_platform.training.worker import Trainer

    context = ray.train.get_context()
    configure_torch(ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0))
    job = with_pieces(TrialJob(**settings))
    rank, world = context.get_world_rank(), context.get_world_size()
    actor = progress_actor(job.sweep)
    if ray.get(actor.progress.remote(job.trial)).state is TrialState.FAILED:
        # A worker of the group before this one met what a restart cannot mend.
        return
    if rank == 0:
        record_placement_group(job.folder)
    trainer: Trainer | None = None
    try:
        trainer = Trainer.of_job(job, ray.train.torch.get_device(), rank, world, actor)
        trainer.run()
    except Exception as error:
        # The group that is started next reads it.
        if trainer is None or not trainer.scoring:
            with_more_pieces(job, error)
        if another_start_may_help(error):
            raise
        # Training again from the checkpoint would only meet the same: report it, and do not ask for a restart.
        on_all_ranks = isinstance(error, JobError)
        if rank == 0:
            _publish_failure(error, job, trainer, actor)
        elif not on_all_ranks and not ray.get(actor.progress.remote(job.trial)).failure:
            _publish_failure(error, job, None, actor)
        if not on_all_ranks and world > 1:
            # The other ranks wait for this one.
            raise


def fail_trial(job: TrialJob, actor: Any, failure: Failure) -> None:
    """Publishes, from any process, why a trial cannot go on."""
    before = TrialStatus()
    with contextlib.suppress(OSError, InputError):
        before = read_status(job.folder) or before
    writer = TrialStatusWriter(job.folder, job.trial, before.steps or 0, job.attempt, actor)
    writer.fail(failure.sentence, step=before.step, traceback=failure.traceback, own_fault=failure.own_fault)
