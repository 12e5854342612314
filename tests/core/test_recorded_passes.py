"""Steps whose passes are recorded once and replayed, by a recorder that repeats operations on a CPU as a CUDA graph does on a GPU."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_core.conformance.test_objective import batch_of, draws_of, network_for, train_step
from soflow_core.gradient_sync import FlatAllReduce, Local
from soflow_core.objectives import OBJECTIVES, AlphaFlow, Batch, Draws, ImprovedConsistency, Objective, SoFlow
from soflow_core.objectives.alpha_schedule import AlphaSchedule
from soflow_core.optimizer import OptimizerConfig
from soflow_core.passes import PassPolicy
from soflow_core.recorded_passes import WARM_UP, RecordedPasses, on_device
from soflow_core.step_checks import check_graphs
from soflow_core.step_record import StepRecord
from soflow_core.train_step import TrainStep
from tests.support.recorded_operations import OperationRecorder

FIRST, LAST = 5, 13
"""Steps of 20: schedules are at neither end."""


def trainings(objective: Objective, **settings: Any) -> tuple[TrainStep, TrainStep, OperationRecorder]:
    """A training, and the same one with recorded passes, from a step on at which schedules are on their way."""
    plain, recorded = train_step(objective, **settings), train_step(objective, **settings)
    for step in (plain, recorded):
        step.policy = replace(step.policy, skip_unused=False)
        step.step = FIRST
    recorder = OperationRecorder()
    recorded.recorded = RecordedPasses(recorded._passes, recorded.all_parameters, recorder)
    return plain, recorded, recorder


def inputs(objective: Objective, k: int, rows: int = 12) -> tuple[Batch, Draws]:
    return batch_of(seed=k, rows=rows), draws_of(objective, seed=k, rows=rows)


def assert_alike(a: StepRecord, b: StepRecord, rel: float = 1e-5) -> None:
    """Sums over memory that begins elsewhere may differ in their last bit."""
    assert (a.step, a.finite, a.culprit, list(a.terms)) == (b.step, b.finite, b.culprit, list(b.terms))
    for one, other in (((a.loss, a.grad_norm), (b.loss, b.grad_norm)), (a.terms, b.terms)):
        assert one == pytest.approx(other, rel=rel, nan_ok=True)


def assert_alike_steps(plain: TrainStep, recorded: TrainStep, first: int, last: int, rows: int = 12) -> None:
    for k in range(first, last):
        assert_alike(*(step(*inputs(step.objective, k, rows)) for step in (recorded, plain)))
    assert_close(recorded.state_dict()["network"], plain.state_dict()["network"], rtol=1e-4, atol=1e-5)
    assert_close(recorded.ema_state(), plain.ema_state(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_replayed_steps_are_those_of_a_training_without_a_recording(method: str, accumulate: int) -> None:
    # Two of iCT's stages in 20 steps, for a recording serves one of them.
    objective = ImprovedConsistency(last_levels=20) if method == "ict" else OBJECTIVES[method]()
    plain, recorded, recorder = trainings(objective, accumulate=accumulate)
    assert_alike_steps(plain, recorded, FIRST, LAST)
    stages = len({objective.phase(k, 20) for k in range(FIRST, LAST)})
    assert recorder.replayed >= LAST - FIRST - stages * WARM_UP > 0


def test_every_phase_of_a_method_is_recorded_anew() -> None:
    schedule = AlphaSchedule(start=0.2, end=0.8, steepness=10, snap=0.05)
    plain, recorded, recorder = trainings(AlphaFlow(schedule=schedule))
    for step in (plain, recorded):
        step.step = 0
    phases = [plain.objective.phase(k, 20) for k in range(20)]
    assert set(phases) == {0, 1, "between"}
    assert_alike_steps(plain, recorded, 0, 20)
    assert recorder.recorded == 3
    assert recorder.replayed == 20 - 3 * WARM_UP


def test_another_number_of_rows_is_recorded_anew() -> None:
    plain, recorded, recorder = trainings(SoFlow())
    assert_alike_steps(plain, recorded, 5, 10)
    assert recorded.recorded is not None
    assert recorded.recorded.recording is not None
    assert_alike_steps(plain, recorded, 10, 15, rows=8)
    assert recorder.recorded == 2


def test_a_refused_step_is_named_and_the_recording_goes_on() -> None:
    plain, recorded, recorder = trainings(SoFlow(), clip_norm=0.5)
    for step in (plain, recorded):
        step.runs_ahead = True
    assert_alike_steps(plain, recorded, 5, 10)
    records = []
    for step in (plain, recorded):
        batch, draws = inputs(step.objective, 10)
        batch.x0[-1] = math.inf
        step.start(batch, draws)
        step.start(*inputs(step.objective, 11))
        records.append(step.finish())
    assert [each.culprit for each in records[1]] == ["consistency_loss"]
    assert_alike(records[1][0], records[0][0])
    assert_alike_steps(plain, recorded, 10, 13)
    assert recorder.recorded == 1


def test_other_weights_in_a_training_are_recorded_anew() -> None:
    plain, recorded, recorder = trainings(SoFlow())
    assert_alike_steps(plain, recorded, 5, 10)
    for step in (plain, recorded):
        step.adopt(replace(SoFlow(), weight_power=0.5), step.config.optimizer)
    assert_alike_steps(plain, recorded, 10, 15)
    assert recorder.recorded == 2


def test_a_state_is_loaded_into_the_memory_of_a_recording() -> None:
    plain, recorded, recorder = trainings(SoFlow())
    state = plain.state_dict()
    state = {**state, "network": {name: 2 * tensor for name, tensor in state["network"].items()}}
    assert_alike_steps(plain, recorded, 5, 10)
    for step in (plain, recorded):
        step.load_state_dict(state)
    assert_alike_steps(plain, recorded, 5, 8)
    assert recorder.recorded == 1


SETTINGS: dict[str, dict[str, Any]] = {
    "averages of two kinds": {"ema_decays": (0.9, 0.99), "power_ema_widths": (0.1,)},
    "a rate that changes and clipping": {
        "clip_norm": 0.05,
        "optimizer": OptimizerConfig(lr=1e-3, eps=1e-4, warmup_steps=12),
    },
    "averages every second step": {"ema_every": 2},
}


def running_ahead(objective: Objective, **settings: Any) -> tuple[TrainStep, TrainStep, OperationRecorder]:
    """As `trainings`, of steps that are started, whose update is recorded too; the recorder is that of updates."""
    plain, recorded, _ = trainings(objective, **settings)
    plain.runs_ahead = recorded.runs_ahead = True
    updates = OperationRecorder()
    recorded.update.record(updates)
    return plain, recorded, updates


def assert_alike_started_steps(plain: TrainStep, recorded: TrainStep, first: int, last: int) -> None:
    for step in (plain, recorded):
        for k in range(first, last):
            step.start(*inputs(step.objective, k))
    for pair in zip(recorded.finish(), plain.finish(), strict=True):
        assert_alike(*pair, rel=1e-4)
    one, other = recorded.state_dict(), plain.state_dict()
    for part in ("network", "ema"):
        assert_close(one[part], other[part], rtol=1e-4, atol=1e-5)
    assert_close(one["optimizer"]["state"], other["optimizer"]["state"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_replayed_updates_are_those_of_a_training_without_a_recording(settings: dict[str, Any]) -> None:
    plain, recorded, updates = running_ahead(SoFlow(), **settings)
    assert_alike_started_steps(plain, recorded, FIRST, LAST)
    assert (updates.recorded, updates.replayed) == (1, LAST - FIRST - WARM_UP)


def test_a_step_that_is_not_finite_is_left_out_by_a_replayed_update() -> None:
    plain, recorded, updates = running_ahead(SoFlow())
    assert_alike_started_steps(plain, recorded, 5, 10)
    before = {name: tensor.clone() for name, tensor in recorded.ema_state().items()}
    batch, draws = inputs(SoFlow(), 10)
    batch.x0[-1] = math.inf
    recorded.start(batch, draws)
    recorded.start(*inputs(SoFlow(), 11))
    (record,) = recorded.finish()
    assert (record.finite, recorded.step) == (False, 10)
    assert_close(recorded.ema_state(), before, rtol=0, atol=0)
    assert_alike_started_steps(plain, recorded, 10, 13)
    assert updates.recorded == 1


def test_an_update_is_recorded_anew_for_new_passes_and_for_a_loaded_state() -> None:
    plain, recorded, updates = running_ahead(SoFlow())
    assert_alike_started_steps(plain, recorded, 5, 10)
    for step in (plain, recorded):
        step.adopt(replace(SoFlow(), weight_power=0.5), step.config.optimizer)
    assert_alike_started_steps(plain, recorded, 10, 15)
    assert updates.recorded == 2
    state = deepcopy(plain.state_dict())
    for step in (plain, recorded):
        step.load_state_dict({**state, "step": 12})
    assert_alike_started_steps(plain, recorded, 12, 15)
    assert updates.recorded == 3


def test_a_checkpoint_of_a_recorded_training_has_the_learning_rate_as_a_number() -> None:
    _, recorded, _ = running_ahead(SoFlow(), optimizer=OptimizerConfig(lr=1e-3, eps=1e-4, warmup_steps=12))
    for k in range(FIRST, LAST):
        recorded.start(*inputs(SoFlow(), k))
    recorded.finish()
    (group,) = recorded.state_dict()["optimizer"]["param_groups"]
    assert (group["lr"], group["capturable"]) == (1e-3, False)


@dataclass(frozen=True)
class Unsaid(SoFlow):
    """A method that does not say what changes from step to step."""

    def schedules(self, step: int, total_steps: int) -> Any:
        del step, total_steps
        return None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"device": torch.device("cpu")}, "graphs records the work of a GPU, and the network is on cpu"),
        ({"sync": FlatAllReduce()}, "graphs records the passes of one worker, and there are several"),
        ({"drawn_by_host": {"dropout": True}}, "graphs does not go with dropout: turn one of them off"),
        ({"objective": Unsaid()}, "define its `schedules`, or turn graphs off"),
    ],
)
def test_what_cannot_be_recorded_is_refused(change: dict[str, Any], sentence: str) -> None:
    good: dict[str, Any] = {"objective": SoFlow(), "device": torch.device("cuda"), "sync": Local()}
    good["drawn_by_host"] = {"dropout": False, "augmentation": False}
    check_graphs(**good)
    with pytest.raises(ValueError, match=sentence):
        check_graphs(**{**good, **change})


def test_a_training_on_a_cpu_has_no_graphs() -> None:
    with pytest.raises(ValueError, match="the network is on cpu: turn graphs off"):
        train_step(SoFlow(), graphs=True)


class Copies(TorchDispatchMode):
    """Context that collects copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if source.device != result.device:
                self.found.append(f"{source.device} to {result.device}, {tuple(source.shape)}")
        return result


@pytest.fixture
def gpu() -> torch.device:
    """The device of tensors without content, for which newer versions of torch with CUDA need no GPU."""
    device = torch.device("cuda")
    try:
        with FakeTensorMode():
            torch.zeros(1).to(device).add(1)
    except (RuntimeError, AssertionError) as error:
        pytest.skip(
            f"torch {torch.__version__} has no tensors of a GPU without one: {str(error).splitlines()[0]}"
        )
    return device


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_a_loss_on_a_gpu_copies_nothing_from_the_host(method: str, gpu: torch.device) -> None:
    # A recording may not hold such a copy, whose source is gone when it is replayed. Tensors without content need no GPU.
    FakeTensorMode.cache_clear()
    objective = OBJECTIVES[method]()
    config, said = network_for(objective).config, objective.schedules(7, 20)
    assert said is not None
    with FakeTensorMode():
        with gpu:
            network = config.build()
        batch, draws = batch_of().to(gpu), draws_of(objective).to(gpu)
        policy = PassPolicy(skip_unused=False, schedules=on_device(said, gpu))
        with Copies() as copies:
            loss = objective.loss(network, batch, draws, 7, 20, policy)
    assert loss.loss.device.type == "cuda"
    assert copies.found == []


def test_a_copy_from_the_host_is_found(gpu: torch.device) -> None:
    with FakeTensorMode(), Copies() as copies:
        torch.zeros(3).to(gpu)
    assert copies.found == ["cpu to cuda:0, (3,)"]
