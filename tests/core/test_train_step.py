"""The training step: resuming, refusing, averaging, and the same sum for any number of ranks."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from soflow_core.ema import EMA
from soflow_core.guidance import Guidance
from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Batch, Draws, Objective, SoFlow
from soflow_core.optimizer import OptimizerConfig
from soflow_core.train_step import TrainStep, TrainStepConfig

CONFIG = DiTConfig(
    channels=1, height=4, width=4, patch=2, hidden=16, depth=1, heads=2, classes=3, null_label=True
)
SHAPE = (1, 4, 4)


def network(seed: int = 0) -> DiT:
    torch.manual_seed(seed)
    net = DiT(CONFIG)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return net


def step_inputs(objective: Objective, step: int, size: int = 8) -> tuple[Batch, Draws]:
    generator = torch.Generator().manual_seed(1000 + step)
    x0 = torch.randn(size, *SHAPE, generator=generator)
    labels = torch.randint(3, (size,), generator=generator)
    return Batch(x0, labels), objective.draw(generator, size, SHAPE, conditional=True)


def train_step(**settings: Any) -> TrainStep:
    settings = {"total_steps": 20, "ema_decays": (0.9, 0.99), "precision": "float32", **settings}
    return TrainStep(network(), SoFlow(), TrainStepConfig(optimizer=OptimizerConfig(lr=1e-2), **settings))


def run(step: TrainStep, first: int, last: int) -> list[float]:
    return [step(*step_inputs(step.objective, k)).loss for k in range(first, last)]


@pytest.mark.parametrize("name", ["adamw", "adam", "radam"])
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def make() -> TrainStep:
        optimizer = OptimizerConfig(name=name, lr=1e-2)
        config = TrainStepConfig(20, optimizer, ema_decays=(0.9, 0.99), power_ema_widths=(0.1,))
        return TrainStep(network(), SoFlow(), config)

    whole = make()
    losses = run(whole, 0, 10)
    part = make()
    first = run(part, 0, 4)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    resumed = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert resumed.step == 4
    assert first + run(resumed, 4, 10) == losses
    for name_, tensor in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name_], tensor)
    for average in (0.9, 0.99, "power-0.1"):
        for name_, tensor in whole.ema_state(average).items():
            assert torch.equal(resumed.ema_state(average)[name_], tensor)


def test_resuming_with_another_total_is_refused() -> None:
    with pytest.raises(ValueError, match="schedules depend on the total"):
        train_step(total_steps=30).load_state_dict(train_step(total_steps=20).state_dict())


def test_a_non_finite_value_changes_nothing_and_names_the_term() -> None:
    step = train_step()
    run(step, 0, 2)
    before = copy.deepcopy(step.state_dict())
    batch, draws = step_inputs(step.objective, 2)
    batch.x0[-1] = math.inf
    record = step(batch, draws)
    assert not record.finite
    assert record.culprit is not None
    assert record.culprit.startswith("consistency")
    assert record.step == 2
    after = step.state_dict()
    for part in ("network",):
        assert all(torch.equal(after[part][k], before[part][k]) for k in before[part])
    assert all(torch.equal(after["ema"]["0.9"][k], before["ema"]["0.9"][k]) for k in before["ema"]["0.9"])
    assert math.isfinite(step(*step_inputs(step.objective, 3)).loss)


def test_a_non_finite_gradient_names_its_parameter() -> None:
    step = train_step()
    parameter = dict(step.module.named_parameters())["final_layer.linear.bias"]
    parameter.register_hook(lambda g: g * math.nan)
    record = step(*step_inputs(step.objective, 0))
    assert (record.finite, record.culprit) == (False, "gradient of final_layer.linear.bias")


def test_a_norm_beyond_float32_is_called_that() -> None:
    step = train_step()
    for parameter in step.parameters:
        parameter.register_hook(lambda g: torch.full_like(g, 1e38))
    record = step(*step_inputs(step.objective, 0))
    assert (record.finite, record.culprit) == (False, "gradient norm")


def test_the_last_step_is_the_last() -> None:
    step = train_step(total_steps=2)
    run(step, 0, 2)
    with pytest.raises(ValueError, match="all 2 steps are done"):
        run(step, 2, 3)
    with pytest.raises(ValueError, match="total_steps is 0"):
        train_step(total_steps=0)


def test_a_network_that_does_not_fit_the_method_is_refused_at_once() -> None:
    plain = DiT(replace(CONFIG, null_label=False))
    with pytest.raises(ValueError, match="soflow drops labels or guides, and this network has no null label"):
        TrainStep(plain, SoFlow(), TrainStepConfig(20))
    TrainStep(plain, SoFlow(guidance=Guidance(scale=1)), TrainStepConfig(20))
    without = TrainStep(DiT(replace(CONFIG, classes=None, null_label=False)), SoFlow(), TrainStepConfig(20))
    with pytest.raises(ValueError, match="the network has no classes"):
        run(without, 0, 1)


@pytest.mark.parametrize("part", ["method", "network", "ema"])
def test_a_state_that_is_refused_changes_nothing(part: str) -> None:
    step = train_step()
    before = copy.deepcopy(step.state_dict())
    other = train_step()
    run(other, 0, 2)
    state = other.state_dict()
    broken = {
        "method": {**state, "method": "meanflow"},
        "network": {**state, "network": {**state["network"], "pos_embed": torch.zeros(1, 2, 3)}},
        "ema": {**state, "ema": {"0.9": state["ema"]["0.9"]}},
    }[part]
    with pytest.raises(
        ValueError, match={"method": "of meanflow", "network": "pos_embed", "ema": "EMAs"}[part]
    ):
        step.load_state_dict(broken)
    after = step.state_dict()
    assert after["step"] == 0
    assert all(torch.equal(after["network"][k], before["network"][k]) for k in before["network"])


def test_clipping_bounds_the_norm_and_reports_it_unclipped() -> None:
    free, clipped = train_step(), train_step(clip_norm=1e-3)
    inputs = step_inputs(free.objective, 0)
    norms = free(*inputs).grad_norm, clipped(*inputs).grad_norm
    assert norms[0] == norms[1] > 1e-3
    total = torch.stack([p.grad.norm() for p in clipped.parameters]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_over_ranks_is_the_loss_and_gradient_of_one_worker(world: int) -> None:
    objective = SoFlow()
    batch, draws = step_inputs(objective, 0, size=16)
    net = network()
    whole = objective.loss(net, batch, draws, 0, 20)
    gradients = torch.autograd.grad(whole.loss, [p for p in net.parameters() if p.requires_grad])
    losses, sums = [], [torch.zeros_like(g) for g in gradients]
    for rank in range(world):
        rows = Batch(batch.x0[rank::world], batch.labels[rank::world])
        part = objective.loss(net, rows, draws.rows(rank, world), 0, 20)
        losses.append(part.loss.item())
        parts = torch.autograd.grad(part.loss, [p for p in net.parameters() if p.requires_grad])
        sums = [s + g / world for s, g in zip(sums, parts, strict=True)]
    assert sum(losses) / world == pytest.approx(whole.loss.item(), rel=1e-6)
    for total, gradient in zip(sums, gradients, strict=True):
        assert_close(total, gradient, rtol=1e-4, atol=1e-6)


def test_ema_is_the_weighted_sum_of_the_parameters() -> None:
    values = torch.randn(30, 5)
    ema = EMA({"w": values[0]}, decays=(0.5, 0.9))
    for k in range(1, 30):
        ema.update([values[k]], step=k)
    for decay in (0.5, 0.9):
        weights = torch.tensor([decay**29] + [(1 - decay) * decay ** (29 - k) for k in range(1, 30)])
        expected = (weights[:, None] * values).sum(0)
        assert_close(ema.average(str(decay))["w"], expected, rtol=1e-5, atol=1e-6)


def test_training_learns() -> None:
    step = train_step(total_steps=300, ema_decays=(0.9,))
    records = [step(*step_inputs(step.objective, 7, size=64)) for _ in range(200)]
    assert records[-1].terms["velocity_mse"] < 0.5 * records[0].terms["velocity_mse"]
