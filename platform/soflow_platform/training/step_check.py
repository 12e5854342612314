"""One optimizer step of a trial on the CPU, with two samples and a small network of its kind: an error in its code shows in seconds.

The objective, the optimizer and the averages are the trial's own; samples are noise of the data's channels and classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch

from soflow_core.failures import InputError
from soflow_core.networks import Architecture
from soflow_core.objectives import Batch
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_pipelines.preparation.builtin import Expected
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError, UserError
from soflow_platform.training.failure import Failure
from soflow_platform.training.model import describe_network
from soflow_platform.training.step_noise import step_generator

ROWS = 2


class StepCheckError(JobError):
    """An exception in the tried step of a trial, with its traceback."""

    def __init__(self, trial: str, failure: Failure) -> None:
        super().__init__(
            f"trial {trial} fails in its first step: {failure.sentence}; nothing was started (--local runs it under a debugger, "
            "--no-check leaves this step out)."
        )
        self.traceback = failure.traceback


def check_first_steps(trials: Iterable[tuple[str, Experiment]], data: Expected) -> None:
    """Try a step of each trial, by name, once for all that differ in nothing that the small step has.

    Raises StepCheckError for an exception in the code, and UserError for settings that are refused, with the name of the trial.
    """
    tried = set()
    for name, experiment in trials:
        network = describe_network(experiment, data).small()
        key = json.dumps([str(network), *_deciding(experiment)], sort_keys=True)
        if key in tried:
            continue
        tried.add(key)
        try:
            try_step(experiment, network)
        except InputError as error:
            raise UserError(f"trial {name}: {error}") from error
        except Exception as error:
            raise StepCheckError(name, Failure.of(error)) from error


def try_step(experiment: Experiment, config: Architecture) -> None:
    """Make one step, in float32 and uncompiled; this process's random generator stays where it was."""
    training, objective = experiment.training, experiment.objective
    settings = TrainStepConfig(
        total_steps=training.steps,
        optimizer=experiment.optimizer,
        ema_decays=training.ema,
        power_ema_widths=training.ema_profiles,
        ema_every=training.ema_every,
        augment=training.augment,
        precision="float32",
        clip_norm=training.clip_norm,
    )
    generator = step_generator(experiment.seed, 1)
    shape = config.sample_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        step = TrainStep(config.build(), objective, settings)
        draws = objective.draw(generator, ROWS, shape, experiment.data.conditional)
        labels = None if config.classes is None else torch.arange(ROWS) % config.classes
        step(Batch(torch.randn(ROWS, *shape, generator=generator), labels), draws)


def _deciding(experiment: Experiment) -> list[object]:
    resolved = experiment.resolved()
    training = {key: resolved["training"][key] for key in ("ema", "clip_norm", "augment")}
    return [resolved["objective"], resolved["optimizer"], resolved["data"]["conditional"], training]
