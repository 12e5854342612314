"""One trial in this process, as Ray would train it, without Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from soflow_platform.config.experiment import Experiment
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.dataset import open_data
from soflow_platform.training.job import TrialJob
from soflow_platform.training.worker import Trainer


def job_of(
    storage: ProjectFolder,
    tracking: Tracking,
    experiment: Experiment,
    sweep: str = "sweep",
    trial: str = "trial",
    tags: Mapping[str, str] | None = None,
    parent: str | None = None,
    **settings: Any,
) -> TrialJob:
    """The job of a trial, with its data and its run in MLflow; `settings` are further fields of TrialJob."""
    location, _ = open_data(experiment, storage)
    run = tracking.open_run(sweep, trial, params={}, tags=tags or {}, trial=trial, parent=parent)
    return TrialJob(
        sweep=sweep,
        trial=trial,
        experiment=experiment.resolved(),
        data=location,
        storage=str(storage.root),
        tracking_uri=tracking.store.uri,
        run=run,
        **settings,
    )


def trainer_of(
    storage: ProjectFolder,
    tracking: Tracking,
    experiment: Experiment,
    sweep: str,
    trial: str,
    **settings: Any,
) -> Trainer:
    """The one worker of a trial; `settings` are those of `job_of`."""
    torch.set_num_threads(1)
    job = job_of(storage, tracking, experiment, sweep, trial, **settings)
    return Trainer.of_job(job, torch.device("cpu"))
