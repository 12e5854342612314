"""Estimates of a trial's cost before it starts: parameters, FLOPs, memory, and the resources requested from Ray."""

from __future__ import annotations

from dataclasses import dataclass

from soflow_core.networks import Architecture
from soflow_core.nfe import training_evaluations
from soflow_platform.config.experiment import Experiment

BYTES_PER_FLOAT = 4


@dataclass(frozen=True)
class Cost:
    """The cost of one trial."""

    parameters: int
    forward_gmac: float
    """Multiply-accumulates of one forward pass of one sample, in 1e9."""
    evaluations_per_sample: float
    """Cost of training on one sample, in forward passes; a backward pass counts as two."""
    state_gigabytes: float
    """Weights, gradients, two Adam moments and the EMAs of one worker, in float32; activations come on top."""
    total_petaflops: float
    """FLOPs of the whole trial, in 1e15."""


def cost(experiment: Experiment, network: Architecture) -> Cost:
    """The cost of one trial."""
    parameters = network.parameters()
    gmac = forward_gmac(network)
    training = experiment.training
    passes = training_evaluations(experiment.objective, training.batch, experiment.data.conditional)
    copies = 4 + len(training.ema)
    total = 2 * gmac * 1e9 * passes * training.batch * training.steps / 1e15
    return Cost(parameters, gmac, passes, copies * parameters * BYTES_PER_FLOAT / 1e9, total)


def forward_gmac(network: Architecture) -> float:
    """Multiply-accumulates of one forward pass of one sample, in 1e9."""
    return network.forward_flops() / 2e9


def request(experiment: Experiment) -> str:
    """The resources that a trial requests from Ray, as text."""
    resources = experiment.resources
    each = f"{resources.cpus_per_worker:g} CPU" + (
        f" and {resources.gpus_per_worker:g} GPU" if resources.gpus_per_worker else ""
    )
    total_cpus = resources.workers * resources.cpus_per_worker
    total_gpus = resources.workers * resources.gpus_per_worker
    total = f"{total_cpus:g} CPU" + (f", {total_gpus:g} GPU" if total_gpus else "")
    return f"{resources.workers} worker(s) of {each} for each trial ({total})"
