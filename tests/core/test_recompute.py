"""Blocks that are run again in the backward pass keep less memory and train the same network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from soflow_core.conformance.test_objective import batch_of, draws_of, network_for, train_step
from soflow_core.networks import UNetConfig
from soflow_core.objectives import OBJECTIVES, FlowMatching, Objective, SoFlow
from soflow_core.recorded_passes import RecordedPasses
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.support.recorded_operations import OperationRecorder

METHODS = sorted(name for name, kind in OBJECTIVES.items() if not kind().uses_jvp)


def inputs(objective: Objective, k: int) -> tuple:
    return batch_of(seed=k), draws_of(objective, seed=k)


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_steps_are_those_of_a_training_without_it_bit_for_bit(method: str) -> None:
    objective = OBJECTIVES[method]()
    plain, recomputed = train_step(objective), train_step(objective, recompute=True, accumulate=1)
    for k in range(3):
        assert recomputed(*inputs(objective, k)) == plain(*inputs(objective, k))
    one, other = plain.state_dict()["network"], recomputed.state_dict()["network"]
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_recomputed_step_is_recorded_too() -> None:
    plain, recorded = train_step(SoFlow(), recompute=True), train_step(SoFlow(), recompute=True)
    for step in (plain, recorded):
        step.policy = replace(step.policy, skip_unused=False)
    recorder = OperationRecorder()
    recorded.recorded = RecordedPasses(recorded._passes, recorded.all_parameters, recorder)
    for k in range(6):
        a, b = recorded(*inputs(SoFlow(), k)), plain(*inputs(SoFlow(), k))
        assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-4)
    assert recorder.replayed == 3


@pytest.mark.parametrize("method", sorted(OBJECTIVES.keys() - set(METHODS)))
def test_a_jacobian_vector_product_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match=r"Jacobian-vector product.*turn recompute off"):
        train_step(OBJECTIVES[method](), recompute=True)


def test_a_network_without_such_blocks_is_refused() -> None:
    unet = UNetConfig(3, 8, 8, base=32, multipliers=(1,), blocks=1, attention=()).build()
    with pytest.raises(ValueError, match="this one has none that can: turn it off"):
        TrainStep(unet, FlowMatching(), TrainStepConfig(3, recompute=True))


def test_it_is_a_setting_of_a_step_and_not_of_the_network() -> None:
    network = network_for(SoFlow())
    assert not network.checkpoint_blocks
    TrainStep(network, SoFlow(), TrainStepConfig(3, recompute=True))
    assert network.checkpoint_blocks
