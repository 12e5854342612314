"""The learning rate is a function of the step alone, exact at its ends, and reaches the optimizer."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import float32
from torch.testing import assert_close

from soflow_core.objectives import SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.support.random_networks import random_inputs, random_network

TOTAL = 100


def rates(total: int = TOTAL, **settings: Any) -> list[float]:
    config = OptimizerConfig(lr=1e-3, **settings)
    return [config.learning_rate(step, total) for step in range(total)]


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    assert rates() == [1e-3] * TOTAL


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_is_linear_from_zero_and_ends_at_the_full_rate(decay: str) -> None:
    found = rates(warmup_steps=10, decay=decay, final_lr=1e-5)
    assert found[:10] == [1e-3 * ((k + 1) / 10) for k in range(10)]
    assert found[9] == 1e-3


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("final", [0.0, 3e-5, 1e-3])
def test_decay_begins_at_the_full_rate_and_ends_at_the_final_one(
    warmup: int, decay: str, final: float
) -> None:
    found = rates(warmup_steps=warmup, decay=decay, final_lr=final)
    assert max(found) == found[max(warmup - 1, 0)] == 1e-3
    assert found[-1] == final


def test_linear_falls_by_equal_amounts_and_cosine_as_a_half_wave() -> None:
    """From step 0 to step 100 of 101, so that step 50 is half way."""
    linear = rates(101, decay="linear", final_lr=2e-4)
    assert linear[50] == pytest.approx(6e-4, rel=1e-12)
    assert linear[25] == pytest.approx(8e-4, rel=1e-12)
    cosine = rates(101, decay="cosine", final_lr=2e-4)
    assert cosine[50] == pytest.approx(6e-4, rel=1e-12)
    assert cosine[25] == pytest.approx(2e-4 + 8e-4 * (1 + math.sqrt(0.5)) / 2, rel=1e-12)


@given(
    warmup=st.integers(0, 30),
    total=st.integers(1, 40),
    decay=st.sampled_from(["constant", "linear", "cosine"]),
    final=st.floats(0, 1e-3),
)
def test_the_rate_rises_to_its_highest_and_never_rises_again(
    warmup: int, total: int, decay: str, final: float
) -> None:
    found = rates(total, warmup_steps=warmup, decay=decay, final_lr=final)
    peak = min(max(warmup - 1, 0), total - 1)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    assert all(0 <= rate <= 1e-3 for rate in found)


def test_rates_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"final_lr is 0\.1; give 0 up to lr"):
        OptimizerConfig(final_lr=0.1)
    with pytest.raises(ValueError, match="warmup_steps is -1"):
        OptimizerConfig(warmup_steps=-1)


@pytest.mark.parametrize("name", ["adamw", "adam", "radam"])
def test_a_step_uses_and_records_its_rate_also_after_resuming(name: str) -> None:
    """A rate that is cut to 0 leaves the parameters as they are; the state holds nothing of the schedule."""
    config = OptimizerConfig(name=name, lr=1e-2, warmup_steps=2, decay="linear")

    def make() -> TrainStep:
        return TrainStep(random_network(float32), SoFlow(), TrainStepConfig(4, config))

    def steps(train: TrainStep, first: int, last: int) -> list[float]:
        inputs = (random_inputs(train.objective, dtype=float32, seed=k) for k in range(first, last))
        return [train(*pair).learning_rate for pair in inputs]

    train = make()
    assert steps(train, 0, 3) == [5e-3, 1e-2, 5e-3]
    resumed = make()
    resumed.load_state_dict(train.state_dict())
    before = {name: p.detach().clone() for name, p in resumed.module.named_parameters()}
    assert steps(resumed, 3, 4) == [0.0]
    assert all(p.equal(before[name]) for name, p in resumed.module.named_parameters())
    assert not all(p.equal(before[name]) for name, p in make().module.named_parameters())


@pytest.mark.parametrize(
    ("name", "kind", "kernel"),
    [
        ("adamw", torch.optim.AdamW, {"fused": True}),
        ("adam", torch.optim.Adam, {"fused": True}),
        ("radam", torch.optim.RAdam, {"foreach": True}),
    ],
)
def test_a_built_optimizer_moves_parameters_as_torchs_own(
    name: Any, kind: type[torch.optim.Optimizer], kernel: dict[str, bool]
) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.1)
    ours, theirs = (
        [torch.nn.Parameter(torch.ones(7, 5)), torch.nn.Parameter(torch.ones(3))] for _ in range(2)
    )
    settings = {"lr": config.lr, "betas": config.betas, "weight_decay": 0.1, "eps": config.eps}
    built, plain = config.build(ours), kind(theirs, **settings, **kernel)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        built.step()
        plain.step()
    assert all(p.equal(q) and p.requires_grad for p, q in zip(ours, theirs, strict=True))
    assert str(built.state_dict()) == str(plain.state_dict())


def test_fused_adam_takes_the_rate_of_each_step() -> None:
    """From nothing, Adam's first update is the rate times the gradient's sign, but for eps."""
    settings = {"lr": 1e-2, "eps": 1e-12}
    whole, half = (OptimizerConfig(**settings, warmup_steps=w) for w in (0, 2))
    moved = []
    for config in (whole, half):
        train = TrainStep(random_network(float32), SoFlow(), TrainStepConfig(4, config))
        assert train.optimizer.defaults["fused"]
        before = train.module.final_layer.linear.bias.detach().clone()
        train(*random_inputs(train.objective, dtype=float32))
        moved.append((train.module.final_layer.linear.bias - before).abs())
    assert moved[0].allclose(moved[0].new_tensor(1e-2), rtol=1e-4)
    assert moved[1].allclose(moved[1].new_tensor(5e-3), rtol=1e-4)


def test_weight_decay_takes_its_share_of_the_weights_beside_adams_step() -> None:
    """AdamW: a step is smaller by lr times the decay times the weights as they were."""
    after = []
    for weight_decay in (0.0, 0.5):
        config = OptimizerConfig(lr=1e-2, weight_decay=weight_decay)
        train = TrainStep(random_network(float32), SoFlow(), TrainStepConfig(4, config))
        before = [p.detach().clone() for p in train.parameters]
        train(*random_inputs(train.objective, dtype=float32))
        after.append(train.parameters)
    for start, plain, decayed in zip(before, *after, strict=True):
        assert_close(plain - decayed, 1e-2 * 0.5 * start, rtol=1e-4, atol=1e-6)
