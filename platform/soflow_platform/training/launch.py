"""soflow_platform.training.launch"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from soflow_platform.cluster.placement import record_placement_group
from soflow_platform.errors import JobError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.trial_status import progress_actor
from soflow_platform.training.worker import TrialJob, TrialWorker


def train_worker(settings: dict[str, Any]) -> None:
    """Ray Train's entry point on every worker: train one trial from its newest checkpoint to its last step."""
    import ray
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    # Ray gives a worker one OpenMP thread; the CPUs it was granted are the threads it may use.
    granted = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    torch.set_num_threads(max(1, int(granted)))
    # cuBLAS is deterministic only with this, and reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    job = TrialJob(**settings)
    if context.get_world_rank() == 0:
        record_placement_group(ProjectFolder(Path(job.storage)).trial(job.sweep, job.trial))
    worker = TrialWorker(
        job,
        device=ray.train.torch.get_device(),
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        board=progress_actor(job.sweep),
    )
    try:
        worker.run()
    except JobError as error:
        # Training again from the checkpoint would only meet the same: tell, and do not ask for a restart.
        logging.getLogger(__name__).error("%s", error)
        if worker.report is not None:
            worker.report.fail(str(error))
