"""Memory of a training step on one worker, by arithmetic: parameters, gradients, moments, averages and activations.

Tested against the tensors that a step allocates on a CPU. A GPU's allocator, its libraries and its communication buffers come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from soflow_core.networks import Architecture, DiTConfig
from soflow_core.networks.dit import FREQUENCIES
from soflow_platform.config.experiment import Experiment
from soflow_platform.training.alignment_cost import alignment_cost
from soflow_platform.training.step_time import FLOAT, Pass

HALF = 2
"""Bytes of a bfloat16 number."""
MOMENTS = 2
"""Of Adam, AdamW and RAdam."""


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker at the fullest moment of a step."""

    parameters: float
    gradients: float
    moments: float
    averages: float
    """EMAs, the teacher's included."""
    activations: float | None
    """None where they are not counted, for networks that are no DiT."""

    @property
    def total(self) -> float:
        """All of them at once: more than a step needs, for activations are freed while gradients are made."""
        state = self.parameters + self.gradients + self.moments + self.averages
        return state + (self.activations or 0.0)


def worker_memory(
    experiment: Experiment, network: Architecture, phases: Iterable[tuple[float, list[Pass]]]
) -> WorkerMemory:
    """Memory of one worker in the phase of the method that takes most; `phases` are those of `step_time.work_of`."""
    training, workers = experiment.training, experiment.resources.workers
    shards = workers if training.parallel == "fsdp" else 1
    weights, trained = FLOAT * network.parameters(), FLOAT * network.trained_parameters()
    teacher = experiment.objective.teacher_decay
    averages = len(training.ema) + (teacher is not None and teacher not in training.ema)
    rows = math.ceil(training.batch / (workers * training.accumulate))
    # A sharded network has two blocks whole: the one that runs and the one that is fetched.
    dit = network if isinstance(network, DiTConfig) else None
    head = alignment_cost(experiment, network)
    beside = FLOAT * head.parameters
    whole = (2 * weights / dit.depth if dit else weights) if shards > 1 else 0.0
    return WorkerMemory(
        parameters=weights / shards + whole + beside,
        gradients=trained / shards + beside,
        moments=MOMENTS * (trained / shards + beside),
        averages=averages * trained / shards,
        activations=max(step_activations(dit, passes, rows) for _, passes in phases) + rows * head.kept_bytes
        if dit
        else None,
    )


def step_activations(network: DiTConfig, passes: list[Pass], rows: int) -> float:
    """Bytes that calls with gradient keep for the backward pass, and beside them the largest call without one, or block run again."""
    kept, beside = 0.0, 0.0
    for call in passes:
        if call.gradient:
            kept += rows * call.rows * saved_bytes(network, call.bfloat16, call.recomputed)
            kept += HALF * network.trained_parameters() if call.bfloat16 else 0
            if call.recomputed:
                beside = max(beside, rows * call.rows * block_bytes(network, call.bfloat16))
        else:
            beside = max(beside, rows * call.rows * running_bytes(network, call))
    return kept + beside


def saved_bytes(network: DiTConfig, bfloat16: bool, recomputed: bool = False) -> float:
    """Bytes that a pass of one sample keeps for its backward pass; of recomputed blocks the inputs alone."""
    number = HALF if bfloat16 else FLOAT
    adaln = not network.condition_tokens
    n, d, patches = network.tokens, network.hidden, network.patches
    output = FLOAT * n * d + ((FLOAT if adaln else 0) + number) * patches * d + 2 * patches * FLOAT
    embeddings = network.embedders * (FREQUENCIES + 2 * d) * FLOAT
    # The sum of the embeddings, and the output layer's modulation.
    embeddings += d * FLOAT + 2 * d * number if adaln else 0
    sample = network.channels * network.height * network.width * number
    block = FLOAT * n * d if recomputed else block_bytes(network, bfloat16)
    return network.depth * block + output + embeddings + sample


def block_bytes(network: DiTConfig, bfloat16: bool) -> float:
    """Bytes that one block keeps for its backward pass.

    Of N tokens of width d: in float32 the inputs of both norms and the norms' outputs (4 N d), in the precision of
    matrix products the inputs of the four linear layers and of GELU (1 + 1 + 1 + 4 + 4), query, key and value (3), and what attention
    and MLP add to the residual stream before it is scaled (2): 80 N d bytes in float32 and 48 N d under autocast. With condition
    tokens a norm's output is itself the input of a linear layer.
    """
    number = HALF if bfloat16 else FLOAT
    adaln = not network.condition_tokens
    n, d = network.tokens, network.hidden
    block: float = ((4 if adaln else 2) * FLOAT + 8 * number) * n * d
    # Mean and scale of two norms, the normalizer of attention, and the modulation with its input.
    block += 4 * n * FLOAT + network.heads * n * FLOAT + ((1 + 6 + 2) * d * number if adaln else 0)
    return block + _mlp_bytes(network, bfloat16) + _query_key_bytes(network, bfloat16)


def _mlp_bytes(network: DiTConfig, bfloat16: bool) -> float:
    """What an MLP keeps beside its input: its hidden layer before and after GELU; or gate, its SiLU, value and product."""
    number = HALF if bfloat16 else FLOAT
    kept = (4 if network.swiglu else 2) * network.mlp_width * network.tokens * number
    # Under autocast each of the two layers makes its own copy of the input.
    return kept + (number * network.tokens * network.hidden if network.swiglu and bfloat16 else 0)


def _query_key_bytes(network: DiTConfig, bfloat16: bool) -> float:
    """What a norm or rotation of queries and keys keeps, beside them as they come out of their layer."""
    number = HALF if bfloat16 else FLOAT
    n, d, kept = network.tokens, network.hidden, 0.0
    if network.qk_norm:
        # The normed ones in float32, under autocast a copy before it too, and the scale of each head.
        kept += 2 * FLOAT * n * (d * (2 if bfloat16 else 1) + network.heads)
    if network.qk_norm or network.rope:
        kept += 2 * number * n * d
    # Rotated ones lie in memory head by head, so that the result of attention is copied.
    return kept + (number * n * d if network.rope else 0)


def running_bytes(network: DiTConfig, call: Pass) -> float:
    """Bytes that a pass of one sample without gradient has at once: a block's tokens, and the MLP's hidden layer before and after GELU.

    A tangent doubles them, and its attention is computed with all N x N weights.
    """
    number = HALF if call.bfloat16 else FLOAT
    n, d = network.tokens, network.hidden
    block = 2 * FLOAT * n * d + 8 * number * n * d
    return 2 * block + 4 * network.heads * n * n * FLOAT if call.tangent else block
