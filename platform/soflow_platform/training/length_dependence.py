"""Whether a training depends on its total number of steps: where it does not, a longer one is its continuation.

Found by trying: the learning rate and the loss of a small network at steps of the training, for several totals. A method of a plugin is
tried like any other.
"""

from __future__ import annotations

import torch

from soflow_core.networks import Architecture
from soflow_core.objectives import Batch
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_platform.config.experiment import Experiment
from soflow_platform.training.step_noise import step_generator

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Where in the training it is tried."""
ROWS = 4


def length_dependence(experiment: Experiment, network: Architecture, steps: int) -> str | None:
    """What of a training depends on its length, where it is to be `steps` long instead; None where nothing does.

    `network` is a small one of its kind. The random generator of this process stays where it was.
    """
    done = experiment.training.steps
    totals = (done, steps, 10 * steps + 1)
    tried = sorted({round(share * (done - 1)) for share in SHARES})
    optimizer = experiment.optimizer
    if any(len({optimizer.learning_rate(step, total) for total in totals}) > 1 for step in tried):
        return f"the learning rate (optimizer.decay: {optimizer.decay}) depends on training.steps"
    if any(_loss_differs(experiment, network, step, totals) for step in tried):
        return f"the schedule of {experiment.objective.method} depends on training.steps"
    return None


def _loss_differs(experiment: Experiment, config: Architecture, step: int, totals: tuple[int, ...]) -> bool:
    """Whether the loss after `step` finished steps differs between totals."""
    objective, shape = experiment.objective, config.sample_shape
    generator = step_generator(experiment.seed, step + 1)
    settings = TrainStepConfig(total_steps=max(totals), ema_decays=(0.5,), precision="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(experiment.seed)
        module = config.build()
        with torch.no_grad():
            for parameter in module.parameters():
                # Layers that begin at zero would hide what a schedule does.
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        train_step = TrainStep(module, objective, settings)
        draws = objective.draw(generator, ROWS, shape, experiment.data.conditional)
        labels = None if config.classes is None else torch.arange(ROWS) % config.classes
        batch = Batch(torch.randn(ROWS, *shape, generator=generator), labels)
        values = set()
        for total in totals:
            torch.manual_seed(experiment.seed)
            result = objective.loss(train_step.network, batch, draws, step, total, train_step.policy)
            values.add((float(result.loss.detach()), objective.phase(step, total)))
    return len(values) > 1
