"""Estimates of a trial's cost before it starts: parameters, FLOPs, memory, and the resources requested from Ray."""

from __future__ import annotations

from dataclasses import dataclass

from soflow_core.networks import DiTConfig
from soflow_core.nfe import training_evaluations
from soflow_platform.config.experiment import Experiment

BYTES_PER_FLOAT = 4
TIME_FREQUENCIES = 256
"""Width of the sinusoidal time embedding of a DiT."""


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


def cost(experiment: Experiment, network: DiTConfig) -> Cost:
    """The cost of one trial."""
    parameters = count_parameters(network)
    gmac = forward_gmac(network)
    training = experiment.training
    passes = training_evaluations(experiment.objective, training.batch, experiment.data.conditional)
    copies = 4 + len(training.ema)
    total = 2 * gmac * 1e9 * passes * training.batch * training.steps / 1e15
    return Cost(parameters, gmac, passes, copies * parameters * BYTES_PER_FLOAT / 1e9, total)


def count_parameters(network: DiTConfig) -> int:
    """Number of parameters of a DiT, the fixed position table included; nothing is built."""

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    d, mlp = network.hidden, int(network.hidden * network.mlp_ratio)
    pixels = network.channels * network.patch**2
    tokens = (network.height // network.patch) * (network.width // network.patch)
    labels = 0 if network.classes is None else (network.classes + int(network.null_label)) * d
    conditions = (2 + network.guidance_scale) * (linear(TIME_FREQUENCIES, d) + linear(d, d))
    block = linear(d, 3 * d) + linear(d, d) + linear(d, mlp) + linear(mlp, d) + linear(d, 6 * d)
    output = linear(d, pixels) + linear(d, 2 * d)
    return linear(pixels, d) + conditions + labels + tokens * d + network.depth * block + output


def forward_gmac(network: DiTConfig) -> float:
    """Multiply-accumulates of one forward pass of one sample, in 1e9: patches, blocks, attention products, output."""
    tokens = (network.height // network.patch) * (network.width // network.patch)
    d = network.hidden
    per_block = (4 + 2 * network.mlp_ratio) * tokens * d * d + 2 * tokens * tokens * d + 6 * d * d
    patch = network.channels * network.patch**2 * d * tokens
    # Times, the guidance scale where it is a condition, and the output layer's modulation.
    embeddings = (2 + network.guidance_scale) * (TIME_FREQUENCIES * d + d * d) + 2 * d * d
    return (network.depth * per_block + 2 * patch + embeddings) / 1e9


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
