"""The parts of one rank of a trial: data loader, network, training step, evaluator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from soflow_core.networks import Architecture
from soflow_core.nfe import training_evaluations
from soflow_core.objectives import Draws
from soflow_core.random_source import CounterSource
from soflow_core.train_step import TrainStep
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_platform.config.experiment import Experiment
from soflow_platform.evaluation.evaluator import Evaluator
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.ema_snapshots import snapshot_store
from soflow_platform.training.alignment_cost import alignment_cost
from soflow_platform.training.feature_targets import alignment_of
from soflow_platform.training.flops import forward_gmac, second_head_flops
from soflow_platform.training.job import TrialJob
from soflow_platform.training.model import network_config
from soflow_platform.training.step_builder import build_train_step
from soflow_platform.training.step_noise import step_generator


@dataclass(frozen=True)
class TrialSetup:
    """The objects that train one rank of a trial, built from its settings."""

    job: TrialJob
    experiment: Experiment
    device: torch.device
    rank: int
    world: int
    """Number of ranks."""
    loader: ShardLoader
    config: Architecture
    train_step: TrainStep
    evaluator: Evaluator

    @classmethod
    def build(cls, job: TrialJob, device: torch.device, rank: int = 0, world: int = 1) -> TrialSetup:
        """Open the data and build the network with initial weights from the seed. Raises UserError where they do not fit."""
        experiment = Experiment(**job.experiment)
        batch, seed = experiment.training.batch, experiment.seed
        loader = ShardLoader(
            job.data,
            batch_size=batch,
            rank=rank,
            world=world,
            seed=seed,
            class_run=experiment.training.class_run,
        )
        config = network_config(experiment, loader.info)
        alignment = alignment_of(experiment, config, loader.info, job.project)
        train_step = build_train_step(experiment, config, device, world, rank, job.start, alignment)
        conditional = experiment.data.conditional
        evaluator = Evaluator.open(experiment.evaluation, loader.info, job.data, conditional, job.project)
        return cls(job, experiment, device, rank, world, loader, config, train_step, evaluator)

    @property
    def checkpoints(self) -> CheckpointStore:
        """The trial's checkpoints."""
        job, base = self.job, self.experiment.training.checkpoints
        return CheckpointStore.of_trial(job.project, job.sweep, job.trial, base)

    @property
    def snapshots(self) -> CheckpointStore:
        """Snapshots of the trial's power-function averages."""
        job, base = self.job, self.experiment.training.checkpoints
        return snapshot_store(job.project, job.sweep, job.trial, base)

    @cached_property
    def _changes(self) -> list[tuple[int, Experiment]]:
        """The last step before each change of settings, and the settings after it; first those of the first step."""
        experiment = self.experiment
        later = [(change.after, experiment.at(change.after + 1)) for change in experiment.training.changes]
        return [(0, experiment.at(1)), *later]

    def settings_at(self, step: int) -> Experiment:
        """The settings of a step, counted from 1."""
        return next(settings for after, settings in reversed(self._changes) if after < max(step, 1))

    def draw(self, step: int) -> Draws:
        """This rank's rows of the step's times and noise, which are drawn for the global batch and do not depend on `world`."""
        experiment, shape = self.settings_at(step), tuple(self.loader.info.shape)
        generator = step_generator(experiment.seed, step)
        batch, conditional = experiment.training.batch, experiment.data.conditional
        return experiment.objective.draw(generator, batch, shape, conditional).rows(self.rank, self.world)

    def draw_on_device(self, step: int) -> Draws:
        """The same by the second version of the draws: this rank's rows alone, on its device."""
        experiment, shape = self.experiment, tuple(self.loader.info.shape)
        source = CounterSource(
            experiment.seed, step, experiment.training.batch, self.rank, self.world, self.device
        )
        return experiment.objective.draw_from(source, shape, experiment.data.conditional)

    @property
    def flops_per_image(self) -> float:
        """FLOPs of training on one image, of all forward and backward passes."""
        experiment = self.experiment
        passes = training_evaluations(
            experiment.objective, experiment.training.batch, experiment.data.conditional
        )
        aligned = alignment_cost(experiment, self.config).image_flops
        head = second_head_flops(
            self.config, experiment.objective, experiment.training.batch, experiment.data.conditional
        )
        return 2e9 * passes * forward_gmac(self.config) + head + aligned


def data_facts(info: DatasetInfo, experiment: Experiment) -> dict[str, Any]:
    """Description of the training data for the header of a weights file."""
    return {**asdict(info), "conditional": experiment.data.conditional}
