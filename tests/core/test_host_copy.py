"""A state in host memory is a copy: later steps do not change it, and it resumes as the state itself does."""

import time
from copy import deepcopy
from typing import Any

import pytest
import torch

from soflow_core import host_copy
from soflow_core.host_copy import HostCopy, map_tensors
from soflow_core.objectives import SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.support.random_networks import random_inputs, random_network


def make(device: str = "cpu") -> TrainStep:
    network = random_network(torch.float32).to(device)
    return TrainStep(network, SoFlow(), TrainStepConfig(10, OptimizerConfig(lr=1e-3), (0.9, 0.5)))


def run(train: TrainStep, first: int, last: int) -> list[float]:
    inputs = (random_inputs(train.objective, dtype=torch.float32, seed=k) for k in range(first, last))
    return [train(*pair).loss for pair in inputs]


def tensors(state: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(state, found.append)
    return found


def without_tensors(state: Any) -> Any:
    return map_tensors(state, lambda tensor: (tuple(tensor.shape), tensor.dtype))


def assert_equal(found: Any, expected: Any) -> None:
    assert without_tensors(found) == without_tensors(expected)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(tensors(found), tensors(expected), strict=True))


devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)


@devices
def test_a_copy_is_the_state_and_stays_it_while_training_goes_on(device: str) -> None:
    train = make(device)
    run(train, 0, 2)
    copy, average = train.host_state(), train.host_ema_state(0.5)
    state, ema = deepcopy(train.state_dict()), deepcopy(train.ema_state(0.5))
    run(train, 2, 4)
    assert_equal(copy, state)
    assert_equal(average, ema)
    assert {t.device.type for t in tensors(copy)} == {"cpu"}
    assert all(t.is_pinned() for t in tensors(copy) if device == "cuda")


@devices
def test_the_next_update_waits_for_a_copy_that_a_thread_takes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is copied is the state before it, however late the thread comes to it."""
    train, copy = make(device), HostCopy()
    run(train, 0, 2)
    state, taken = deepcopy(train.state_dict()), host_copy._copy

    def late(*arguments: Any) -> None:
        time.sleep(0.3)
        taken(*arguments)

    monkeypatch.setattr(host_copy, "_copy", late)
    pending = train.start_host_state(copy)
    run(train, 2, 3)
    assert 0 < pending.held < 0.4
    assert_equal(pending.wait(), state)
    assert all(t.is_pinned() for t in tensors(pending.wait()) if device == "cuda")
    state = deepcopy(train.state_dict())
    pending = train.start_host_state(copy)
    with train.averaged():
        assert_equal(pending.wait(), state)


def test_a_copy_that_fails_does_not_hold_the_training_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(host_copy, "_copy", fails)
    train = make()
    pending = train.start_host_state()
    run(train, 0, 1)
    with pytest.raises(MemoryError, match="no room"):
        pending.wait()


def test_a_training_resumed_from_a_copy_is_the_uninterrupted_one() -> None:
    """Also after the copy's memory was used again: nothing of it is kept."""
    whole = make()
    losses = run(whole, 0, 6)
    part, copy = make(), HostCopy()
    run(part, 0, 3)
    resumed = make()
    resumed.load_state_dict(part.host_state(copy))
    run(part, 3, 4)
    part.host_state(copy)
    assert run(resumed, 3, 6) == losses[3:]
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_the_next_copy_uses_the_same_memory() -> None:
    train, copy = make(), HostCopy()
    run(train, 0, 1)
    first = tensors(train.host_state(copy))
    run(train, 1, 2)
    second = train.host_state(copy)
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in tensors(second)]
    assert_equal(second, train.state_dict())


def test_memory_of_another_shape_or_kind_is_taken_anew() -> None:
    copy = HostCopy()
    states = [
        {"a": torch.ones(2, 3), "b": [torch.zeros(2), 1]},
        {"a": torch.ones(3, 2), "b": [torch.zeros(2, dtype=torch.int64), "x"]},
        {"a": torch.ones(3, 2)},
        {"a": torch.full((3, 2), 2.0), "b": (torch.ones(2, dtype=torch.int64), None), "c": torch.ones(())},
    ]
    for state in states:
        assert_equal(copy.take(state), state)


def test_the_state_before_the_first_step_is_copied_too() -> None:
    assert_equal(make().host_state(), make().state_dict())
