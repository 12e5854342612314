"""Trains one trial in this process without Ray, and keeps nothing: for a debugger, a profiler, or a quick look at the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch

from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.evaluation.evaluator import Evaluation
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.dataset import open_data
from soflow_platform.training.job import TrialJob
from soflow_platform.training.launch import configure_torch
from soflow_platform.training.setup import TrialSetup
from soflow_platform.training.start import Start
from soflow_platform.training.trial_io import NullIO
from soflow_platform.training.worker import Trainer


class PrintingIO(NullIO):
    """Prints what a trial reports, and writes nothing."""

    def __init__(self, say: Callable[[str], None], every: int) -> None:
        """`every` is the number of steps between two printed losses."""
        self._say, self._every = say, every
        self._flagged: set[str] = set()

    def log(self, text: str, step: int | None = None) -> None:
        self._say(text if step is None else f"step {step:,}: {text}")

    def progress(self, step: int, images: int, rate: float, loss: float, eta_seconds: float | None) -> None:
        del images, eta_seconds
        if step == 1 or step % self._every == 0:
            self._say(f"step {step:,}: loss {loss:.6g}, {rate:,.0f} images/s")

    def evaluated(self, step: int, result: Evaluation) -> None:
        scores = ", ".join(f"{name} {value:.6g}" for name, value in result.metrics.items())
        self._say(f"step {step:,}: {scores}")
        for flag in result.flags:
            if flag not in self._flagged:
                self._flagged.add(flag)
                self._say(flag)


def train_locally(
    experiment: Experiment,
    trial: str,
    project: ProjectFolder,
    say: Callable[[str], None],
    start: Start | None = None,
) -> Trainer:
    """Train a trial to its last step with one worker, in this thread, and return its trainer.

    Weights and scores are those of the same trial in a sweep. Built-in data and reference statistics are written to the project
    folder where they are missing. Raises UserError where this machine has no GPU and the trial asks for one.
    """
    resources = experiment.resources
    if resources.gpus_per_worker and not torch.cuda.is_available():
        raise UserError(
            f"this machine has no GPU and resources.gpus_per_worker is {resources.gpus_per_worker:g}: pass "
            "--set resources.gpus_per_worker=0 to train on its CPU."
        )
    location, _ = open_data(experiment, project)
    configure_torch(resources.cpus_per_worker)
    job = TrialJob(
        sweep="local",
        trial=trial,
        experiment=experiment.resolved(),
        data=location,
        storage=str(project.root),
        tracking_uri="",
        run="",
        start=None if start is None else start.as_dict(),
    )
    setup = TrialSetup.build(job, torch.device("cuda" if resources.gpus_per_worker else "cpu"))
    trainer = Trainer(setup, PrintingIO(say, experiment.training.log_every))
    trainer.run()
    return trainer
