"""A step in pieces makes the gradients, and so the update, of the same rows at once."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from soflow_core.guidance import Guidance, IntervalGuidance, VelocityGuidance
from soflow_core.objectives import (
    OBJECTIVES,
    AlphaFlow,
    AlphaSchedule,
    ImprovedMeanFlow,
    MeanFlow,
    Objective,
    Shortcut,
    SoFlow,
)
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import PassPolicy
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.support.random_networks import random_inputs, random_network

CASES: dict[str, Objective] = {name: kind() for name, kind in OBJECTIVES.items()} | {
    "soflow, guided": SoFlow(guidance=Guidance(scale=3.0, mix=0.25, drop=0.3)),
    "meanflow, guided": MeanFlow(guidance=VelocityGuidance(omega=0.75, kappa=0.75, drop=0.3)),
    "improved_meanflow, guided": ImprovedMeanFlow(guidance=IntervalGuidance(scale=3.0, drop=0.3)),
    "meanflow, quotient": MeanFlow(derivative="finite_difference"),
    "alphaflow, discrete": AlphaFlow(schedule=AlphaSchedule(kind="constant", value=0.1)),
    "shortcut, half": Shortcut(bootstrap_share=0.45, teacher_ema=0.5),
}


def make(objective: Objective, dtype: torch.dtype, **settings: Any) -> TrainStep:
    """In the middle of training, so that schedules are at no end and a teacher is not the network."""
    settings = {"precision": "float32", **settings}
    train = TrainStep(
        random_network(dtype), objective, TrainStepConfig(20, OptimizerConfig(lr=1e-3), (0.9,), **settings)
    )
    other = random_network(dtype, seed=1)
    for average in train.ema.averages.values():
        for name, tensor in average.items():
            tensor.copy_(other.get_parameter(name))
    train.step = 10
    return train


def gradients(train: TrainStep) -> list[torch.Tensor]:
    return [p.grad for p in train.parameters if p.grad is not None]


@pytest.mark.parametrize("pieces", [2, 4, 12])
@pytest.mark.parametrize("case", CASES)
def test_pieces_give_the_gradient_and_loss_of_the_whole_batch(case: str, pieces: int) -> None:
    """Of 12 rows 9 are velocity rows (in the last case 7), so that pieces have unlike shares of them."""
    # Averages are float32, and so is a network that they teach.
    dtype = torch.float64 if CASES[case].teacher_decay is None else torch.float32
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    inputs = random_inputs(CASES[case], size=12, dtype=dtype)
    whole, parts = (make(CASES[case], dtype, accumulate=n) for n in (1, pieces))
    records = [train(*inputs) for train in (whole, parts)]
    # Terms and losses of a record are float32.
    assert records[1].loss == pytest.approx(records[0].loss, rel=1e-6)
    assert set(records[0].terms) == set(records[1].terms)
    for one, other in zip(gradients(whole), gradients(parts), strict=True):
        assert_close(other, one, **tolerance)
    assert records[1].step == 11


@pytest.mark.parametrize("case", ["soflow, guided", "meanflow, guided", "shortcut, half"])
def test_in_float32_several_steps_in_pieces_stay_those_in_one(case: str) -> None:
    trains = [make(CASES[case], torch.float32, accumulate=n) for n in (1, 3)]
    for k in range(3):
        inputs = random_inputs(CASES[case], size=12, dtype=torch.float32, seed=k)
        losses = [train(*inputs).loss for train in trains]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        for one, other in zip(*map(gradients, trains), strict=True):
            assert_close(other, one, rtol=2e-3, atol=2e-5)


def test_one_update_and_one_average_for_all_pieces() -> None:
    train = make(SoFlow(), torch.float32, accumulate=4)
    before = copy.deepcopy(train.state_dict())
    train(*random_inputs(train.objective, dtype=torch.float32))
    state = train.state_dict()
    assert {slots["step"].item() for slots in state["optimizer"]["state"].values()} == {1.0}
    name = "blocks.0.mlp.fc1.weight"
    expected = torch.lerp(before["ema"]["0.9"][name], state["network"][name], 0.1)
    assert torch.equal(state["ema"]["0.9"][name], expected)


def test_terms_are_the_mean_of_those_of_the_pieces() -> None:
    """Pieces of like shares of both branches: 8 of 12 rows, in 4 pieces of 3."""
    objective = SoFlow(flow_matching_share=2 / 3 + 1e-9)
    inputs = random_inputs(objective, size=12)
    assert inputs[1].velocity_rows == 8
    terms = [make(objective, torch.float64, accumulate=n)(*inputs).terms for n in (1, 4)]
    assert terms[1] == pytest.approx(terms[0], rel=1e-6)


@pytest.mark.parametrize("row", [0, 1, 11])
def test_a_piece_that_is_not_finite_refuses_the_whole_step(row: int) -> None:
    train = make(SoFlow(), torch.float32, accumulate=4)
    before = copy.deepcopy(train.state_dict())
    batch, draws = random_inputs(train.objective, dtype=torch.float32)
    batch.x0[row] = math.nan
    record = train(batch, draws)
    assert (record.finite, record.step) == (False, 10)
    assert record.culprit == ("velocity_loss" if row < 9 else "consistency_loss")
    for name, tensor in train.state_dict()["network"].items():
        assert torch.equal(tensor, before["network"][name])


def test_rows_that_do_not_divide_are_refused_in_one_sentence() -> None:
    train = make(SoFlow(), torch.float32, accumulate=5)
    with pytest.raises(
        ValueError, match=r"^12 rows do not divide into 5 equal pieces; .* multiple of accumulate"
    ):
        train(*random_inputs(train.objective, dtype=torch.float32))
    with pytest.raises(ValueError, match="accumulate is 0"):
        make(SoFlow(), torch.float32, accumulate=0)


@pytest.mark.parametrize("case", CASES)
def test_a_piece_of_one_row_asks_for_no_pass_of_none(case: str) -> None:
    """Of 12 pieces the first has a row of one branch alone, the last of the other."""
    network = random_network()
    rows: list[int] = []
    network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    batch, draws = random_inputs(CASES[case], size=12)
    for piece in (0, 11):
        for skip in (True, False):
            given = batch.rows(piece, 12), draws.rows(piece, 12)
            assert CASES[case].loss(network, *given, 10, 20, PassPolicy(skip_unused=skip)).loss.isfinite()
    assert 0 not in rows
