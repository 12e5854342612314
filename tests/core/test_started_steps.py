"""Steps that the device does one after the other, without the host waiting for each: `start` and `finish`."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from soflow_core.networks import DiT
from soflow_core.objectives import OBJECTIVES, Batch, Draws, Objective
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.core.test_train_step import CONFIG, SHAPE, run, step_inputs, train_step


def ahead(**settings: Any) -> TrainStep:
    """A training whose steps are left to the device, as on a GPU."""
    step = train_step(clip_norm=0.5, power_ema_widths=(0.1,), **settings)
    step.runs_ahead = True
    return step


def broken(objective: Objective, number: int) -> tuple[Batch, Draws]:
    batch, draws = step_inputs(objective, number)
    batch.x0[-1] = math.inf
    return batch, draws


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize("every", [1, 2])
def test_started_steps_are_bit_for_bit_those_that_are_waited_for(every: int) -> None:
    waited, started = (ahead(ema_every=every) for _ in range(2))
    records = [waited(*step_inputs(waited.objective, k)) for k in range(6)]
    for k in range(6):
        started.start(*step_inputs(started.objective, k))
    assert started.step == 6
    assert started.finish() == records
    assert started.finish() == []
    assert_same(started.state_dict(), waited.state_dict())


@pytest.mark.parametrize("every", [1, 2])
def test_a_refused_step_and_those_started_after_it_change_nothing(every: int) -> None:
    waited, started = (ahead(ema_every=every) for _ in range(2))
    run(waited, 0, 3)
    before = copy.deepcopy(waited.state_dict())
    for k in range(3):
        started.start(*step_inputs(started.objective, k))
    started.start(*broken(started.objective, 3))
    started.start(*step_inputs(started.objective, 4))
    started.start(*step_inputs(started.objective, 5))
    records = started.finish()
    assert [(record.step, record.finite) for record in records] == [
        (1, True),
        (2, True),
        (3, True),
        (3, False),
    ]
    refused = waited(*broken(waited.objective, 3))
    assert records[-1].culprit == refused.culprit == "consistency_loss"
    assert started.step == 3
    assert_same(started.state_dict(), before)
    started.start(*step_inputs(started.objective, 3))
    assert started.finish() == [waited(*step_inputs(waited.objective, 3))]
    assert_same(started.state_dict(), waited.state_dict())


def test_a_gradient_that_is_not_finite_is_named() -> None:
    step = ahead()
    hook = step.parameters[-1].register_hook(lambda g: g * math.nan)
    step.start(*step_inputs(step.objective, 0))
    assert step.finish()[0].culprit == f"gradient of {step.names[-1]}"
    hook.remove()
    step.start(*step_inputs(step.objective, 0))
    assert step.finish()[0].finite


def test_the_state_of_steps_under_way_is_not_given_away() -> None:
    step = ahead()
    step.start(*step_inputs(step.objective, 0))
    for use in (
        step.state_dict,
        step.ema_state,
        step.host_state,
        step.start_host_state,
        step.host_ema_state,
        lambda: step.averaged().__enter__(),
        lambda: step.load_state_dict({"total_steps": 20}),
        lambda: step(*step_inputs(step.objective, 1)),
    ):
        with pytest.raises(RuntimeError, match="1 steps are under way"):
            use()
    step.finish()
    assert step.state_dict()["step"] == 1


def test_on_a_cpu_a_started_step_is_done_at_once() -> None:
    step, waited = train_step(), train_step()
    assert not step.runs_ahead
    step.start(*step_inputs(step.objective, 0))
    assert step.state_dict()["step"] == 1
    assert step.finish() == [waited(*step_inputs(step.objective, 0))]


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_a_started_step_reads_nothing_back_from_the_device(method: str) -> None:
    # What torch has kept of an operation of the same shapes, in another method's step, is without its forward-mode derivative.
    FakeTensorMode.cache_clear()
    # Tensors without content: to read a number of one, as a wait for a GPU would, raises.
    with FakeTensorMode():
        kind = OBJECTIVES[method]
        step = TrainStep(
            DiT(CONFIG), kind(), TrainStepConfig(20, OptimizerConfig(), ema_decays=(0.9,), clip_norm=1.0)
        )
        step.policy = replace(step.policy, skip_unused=False)
        step.runs_ahead = True
        batch = Batch(torch.randn(8, *SHAPE), torch.zeros(8, dtype=torch.int64))
        step.start(batch, step.objective.draw(None, 8, SHAPE, conditional=True))
        with pytest.raises(DataDependentOutputException):
            step.finish()
