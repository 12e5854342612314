"""FLOPs and memory of a step, counted by arithmetic, against those of the step itself on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import OBJECTIVES, Batch, MeanFlow, Objective, SoFlow
from soflow_core.passes import PassPolicy
from soflow_platform.config.experiment import Experiment
from soflow_platform.jobs.benchmark import TrainingBenchmark, measure_peak
from soflow_platform.training.memory import saved_bytes, step_activations, worker_memory
from soflow_platform.training.step_time import work_of

NETWORK = DiTConfig(4, 16, 16, patch=2, hidden=192, depth=3, heads=4, classes=10, null_label=True)
TOTAL = 64
"""Steps of a training, one for each point at which phases are looked for."""


def step_flops(objective: Objective, step: int, batch: int, recompute: bool = False) -> int:
    """FLOPs that torch counts in a step: loss and backward pass, with attention in operations that it knows."""
    generator = torch.Generator().manual_seed(0)
    network = DiT(NETWORK, checkpoint_blocks=recompute)
    data = Batch(torch.randn(batch, 4, 16, 16, generator=generator), torch.zeros(batch, dtype=torch.int64))
    draws = objective.draw(generator, batch, (4, 16, 16), True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective.loss(network, data, draws, step, TOTAL, PassPolicy(skip_unused=False)).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", OBJECTIVES)
def test_flops_of_a_step_are_those_that_torch_counts(method: str) -> None:
    objective, batch = OBJECTIVES[method](), 8
    counted = work_of(NETWORK, objective, "float32", batch)
    phases = list(dict.fromkeys(objective.phase(step, TOTAL) for step in range(TOTAL)))
    steps = [next(k for k in range(TOTAL) if objective.phase(k, TOTAL) == phase) for phase in phases]
    assert len(counted) == len(steps)
    for (_, work), step in zip(counted, steps, strict=True):
        flops = work.executed * work.forward_flops * batch
        # The first layer needs no gradient of its input.
        assert flops == pytest.approx(step_flops(objective, step, batch), rel=0.005)


def test_flops_of_recomputed_blocks_are_counted() -> None:
    ((_, work),) = work_of(NETWORK, SoFlow(), "float32", 8, recompute=True)
    flops = work.executed * work.forward_flops * 8
    # Patches, embeddings and the output layer are not run again.
    assert flops == pytest.approx(step_flops(SoFlow(), 0, 8, recompute=True), rel=0.01)
    assert work.forwards == 4.5
    assert work.executed == 5.5


def kept_bytes(network: DiT, rows: int, bfloat16: bool) -> int:
    """Bytes of floating-point tensors, parameters aside, that a pass keeps for its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    times, labels = torch.rand(rows), torch.zeros(rows, dtype=torch.int64)
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saving, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        result = network(torch.randn(rows, 4, 16, 16), times, times / 2, labels)
    assert result.requires_grad
    own = (t for place, t in kept.items() if place not in weights and t.is_floating_point())
    return sum(tensor.untyped_storage().nbytes() for tensor in own)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm": {"qk_norm": True, "registers": 3},
    "rotation": {"rope": True, "swiglu": True},
    "all": {"qk_norm": True, "rope": True, "swiglu": True, "registers": 4, "condition_tokens": 2},
}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_what_a_sample_keeps_for_the_backward_pass_is_counted_to_the_byte(
    options: str, bfloat16: bool
) -> None:
    config = replace(NETWORK, **OPTIONS[options])
    network = DiT(config)
    # Of two batches the difference, which has no copies of weights in it.
    each = (kept_bytes(network, 5, bfloat16) - kept_bytes(network, 2, bfloat16)) / 3
    assert each == saved_bytes(config, bfloat16)


@pytest.mark.parametrize(
    ("objective", "tolerance", "recompute"),
    [(SoFlow(), 0.1, False), (MeanFlow(), 0.15, False), (SoFlow(), 0.1, True)],
    ids=["soflow", "meanflow", "soflow recomputed"],
)
def test_memory_of_a_step_is_that_of_its_tensors(
    objective: Objective, tolerance: float, recompute: bool
) -> None:
    batch = 24
    experiment = Experiment.model_validate(
        {
            "name": "memory",
            "data": {"shape": [4, 16, 16], "classes": 10},
            "network": {"patch": 2, "hidden": 192, "depth": 3, "heads": 4},
            "objective": objective,
            "training": {
                "steps": 64,
                "batch": batch,
                "ema": [0.9, 0.99],
                "precision": "float32",
                "recompute": recompute,
            },
            "evaluation": {"every": 64},
        }
    )
    counted = work_of(NETWORK, objective, "float32", batch, recompute=recompute)
    phases = [(share, work.passes) for share, work in counted]
    memory = worker_memory(experiment, NETWORK, phases)
    assert memory.averages == 2 * memory.gradients
    assert memory.activations == max(step_activations(NETWORK, passes, batch) for _, passes in phases)
    peak = measure_peak(TrainingBenchmark(NETWORK, experiment), torch.device("cpu"))
    # Activations are freed while gradients are made, so that a step never has all of both.
    assert memory.total - memory.gradients <= peak * (1 + tolerance)
    assert peak <= memory.total * (1 + tolerance)
