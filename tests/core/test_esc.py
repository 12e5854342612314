"""Explicit ShortCut against its definition, its schedules, and whose images a plug-in velocity is of."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.gradient_sync import DDP
from soflow_core.guidance import VelocityGuidance, drop_labels
from soflow_core.networks import DiT
from soflow_core.objectives import Batch, ExplicitShortcut, MeanFlow
from soflow_core.objectives.esc import PlugInDraws, end_times
from soflow_core.passes import Network, PassPolicy
from soflow_core.rows import row_sum
from soflow_core.train_step import TrainStep, TrainStepConfig
from tests.core.test_baselines import central_derivative
from tests.core.test_point_data import A, two_points_velocity
from tests.support.gaussian import column, runge_kutta
from tests.support.random_networks import gradient, random_inputs, random_network

GUIDANCE = VelocityGuidance(omega=0.75, kappa=0.75, end=0.8, drop=0.3)
UNGUIDED = VelocityGuidance()


def inputs(objective: ExplicitShortcut, **settings: Any) -> tuple[Batch, PlugInDraws]:
    batch, draws = random_inputs(objective, **settings)
    assert isinstance(draws, PlugInDraws)
    return batch, draws


def velocity_through(x_t: Tensor, t: Tensor, images: Tensor) -> Tensor:
    """(1, C, H, W), (), (N, C, H, W) -> the mean of (x_t - x_b) / t by the posteriors of the images."""
    logits = -(x_t - (1 - t) * images).square().sum((1, 2, 3)) / (2 * t**2)
    return (logits.softmax(0).reshape(-1, 1, 1, 1) * (x_t - images) / t).sum(0)


def esc_loss(
    objective: ExplicitShortcut, network: Network, batch: Batch, draws: PlugInDraws, step: int
) -> Tensor:
    """ESC's loss from its definition, with a difference quotient for du/dt; the velocity row by row."""
    t, labels, guidance = draws.t, batch.labels, objective.guidance
    x_t = column(1 - t) * batch.x0 + column(t) * draws.noise
    v = draws.noise - batch.x0
    for row in draws.plugged.nonzero().flatten().tolist():
        alike = torch.ones(len(t), dtype=torch.bool)
        if labels is not None and not draws.dropped[row] and objective.plug_in_images == "label":
            alike = labels == labels[row]
        v[row] = velocity_through(x_t[row : row + 1], t[row], batch.x0[alike])
    zero_share = 2 / math.pi * math.acos(min(1.0, step / objective.zero_steps))
    leading = torch.arange(len(t)) < draws.velocity_rows
    s = torch.where(~leading & (draws.chance < zero_share), 0, draws.s)
    seen = None if labels is None else drop_labels(labels, draws.dropped)
    with torch.no_grad():
        if labels is not None:
            v_u, v_p = network(x_t, t, t, None), network(x_t, t, t, labels)
            guided = guidance.omega * v + (1 - guidance.omega - guidance.kappa) * v_u + guidance.kappa * v_p
            inside = (t >= guidance.start) & (t <= guidance.end) & ~draws.dropped
            v = torch.where(column(inside), guided, v)
        warmup = min(1.0, step / objective.warmup_steps)
        target = v - warmup * column(t - s) * central_derivative(network, x_t, t, s, seen, v)
    error = row_sum((network(x_t, t, s, seen) - target).square()) ** 2
    return (error / (error.detach() + objective.weight_eps) ** objective.weight_power).mean()


@pytest.mark.parametrize("step", [0, 30, 80])
@pytest.mark.parametrize("images", ["label", "batch"])
@pytest.mark.parametrize("conditional", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("skip_unused", [True, False], ids=["skipping", "whole"])
def test_esc_is_its_definition(step: int, images: Any, conditional: bool, skip_unused: bool) -> None:
    objective = ExplicitShortcut(
        flow_matching_share=0.5,
        plug_in_share=0.7,
        plug_in_images=images,
        zero_steps=60,
        warmup_steps=50,
        weight_power=0.75,
        guidance=GUIDANCE,
    )
    network = random_network()
    batch, draws = inputs(objective, size=16, conditional=conditional, seed=2)
    assert 4 < int(draws.plugged.sum()) < 16
    found = objective.loss(network, batch, draws, step, 100, PassPolicy(skip_unused=skip_unused)).loss
    expected = esc_loss(objective, network, batch, draws, step)
    assert_close(found, expected, rtol=1e-7, atol=0)
    assert_close(gradient(found, network), gradient(expected, network), rtol=1e-5, atol=1e-8)


def test_without_its_changes_it_is_meanflow_with_another_weight() -> None:
    """S^2 / sg(S^2 + eps) has twice the gradient of S / sg(S + eps') where both eps vanish."""
    esc = ExplicitShortcut(
        plug_in_share=0.0, zero_steps=0, warmup_steps=0, weight_eps=1e-12, guidance=GUIDANCE
    )
    meanflow = MeanFlow(weight_eps=1e-12, guidance=GUIDANCE)
    network = random_network()
    batch, draws = inputs(esc)
    ours, theirs = (
        gradient(each.loss(network, batch, draws, 0, 1).loss, network) for each in (esc, meanflow)
    )
    assert_close(ours, 2 * theirs, rtol=1e-9, atol=1e-12)


def test_with_all_data_in_the_batch_its_target_is_the_exact_average_velocity() -> None:
    """MeanFlow's, from the velocities of samples, is that on average alone."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.tensor([-A, A], dtype=torch.float64).reshape(2, 1, 1, 1).repeat(8, 1, 1, 1)
    noise = torch.randn(16, 1, 1, 1, generator=generator, dtype=torch.float64)
    t = 0.4 + 0.5 * torch.rand(16, generator=generator, dtype=torch.float64)
    s = 0.25 + (t - 0.35) * torch.rand(16, generator=generator, dtype=torch.float64)
    every = torch.ones(16, dtype=torch.bool)
    draws = PlugInDraws(noise, t, s, None, 0, plugged=every, chance=torch.ones(16))

    def network(x: Tensor, t: Tensor, s: Tensor, _labels: Tensor | None) -> Tensor:
        return (x - runge_kutta(two_points_velocity, x, t, s, steps=80)) / column(t - s)

    settings: dict[str, Any] = {"flow_matching_share": 0.0, "guidance": UNGUIDED}
    esc = ExplicitShortcut(plug_in_share=1.0, zero_steps=0, warmup_steps=0, **settings)
    assert esc.loss(network, Batch(x0), draws, 0, 1).terms["average_mse"] < 1e-10
    assert MeanFlow(**settings).loss(network, Batch(x0), draws, 0, 1).terms["average_mse"] > 0.1


def test_a_plug_in_velocity_is_of_the_images_with_the_label_of_its_row() -> None:
    """All of them where the label is dropped: there the velocity of all classes is learned."""
    objective = ExplicitShortcut(plug_in_share=1.0, guidance=UNGUIDED)
    batch, draws = inputs(objective)
    # Near the noise, where every image has some weight.
    draws = replace(draws, t=torch.full_like(draws.t, 0.9))
    dropped = torch.arange(12) % 2 == 0
    own = objective._velocity(batch, draws, dropped)
    moved = Batch(torch.where(column(batch.labels == 0), batch.x0, batch.x0 + 1), batch.labels)
    other = objective._velocity(moved, draws, dropped)
    kept = batch.labels == 0
    assert (kept & ~dropped).any()
    assert (kept & dropped).any()
    assert torch.equal(own[kept & ~dropped], other[kept & ~dropped])
    assert (own[kept & dropped] != other[kept & dropped]).flatten(1).any(1).all()


def test_rows_of_a_part_see_the_images_of_the_whole_batch() -> None:
    objective = ExplicitShortcut(plug_in_share=1.0, guidance=UNGUIDED)
    batch, draws = inputs(objective)
    keep = torch.zeros(12, dtype=torch.bool)
    whole = objective._velocity(batch, draws, keep)
    for rank in range(3):
        found = objective._velocity(batch.rows(rank, 3), draws.rows(rank, 3), keep[rank::3])
        assert_close(found, whole[rank::3])
        assert batch.rows(rank, 3).rows(0, 2).whole is batch


def test_steps_to_zero_come_first_and_the_derivative_comes_in_gradually() -> None:
    objective = ExplicitShortcut()
    assert [objective.zero_share(step) for step in (0, 20_000, 10**6)] == [1.0, 0.0, 0.0]
    assert objective.zero_share(10_000) == pytest.approx(2 / 3)
    assert [objective.warmup(step) for step in (0, 2500, 10_000, 10**6)] == [0.0, 0.25, 1.0, 1.0]
    at_once = ExplicitShortcut(zero_steps=0, warmup_steps=0)
    assert (at_once.zero_share(0), at_once.warmup(0)) == (0.0, 1.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_rows_behind_the_velocity_rows_goes_to_zero(share: float) -> None:
    draws = ExplicitShortcut().draw(torch.Generator().manual_seed(0), 8000, (1, 1, 1), True)
    assert isinstance(draws, PlugInDraws)
    s, first = end_times(draws, share), draws.velocity_rows
    assert torch.equal(s[:first], draws.t[:first])
    assert (s[first:] == 0).double().mean().item() == pytest.approx(share, abs=0.03)
    kept = s[first:] > 0
    assert torch.equal(s[first:][kept], draws.s[first:][kept])


def test_half_of_the_rows_have_the_plug_in_velocity() -> None:
    draws = ExplicitShortcut().draw(torch.Generator().manual_seed(0), 8000, (1, 1, 1), True)
    assert isinstance(draws, PlugInDraws)
    assert draws.plugged.double().mean().item() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plug_in_share": 1.5}, "plug_in_share is 1.5; a share from 0 to 1"),
        ({"zero_steps": -1}, "zero_steps is -1; give 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps is -1; give 0 or more"),
        ({"plug_in_images": "class"}, "it is one of 'label', 'batch'"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplicitShortcut(**settings)


def test_images_that_cannot_all_be_seen_are_refused() -> None:
    def build(network: DiT, sync: Any = None, **settings: Any) -> None:
        objective = ExplicitShortcut(derivative="finite_difference")
        TrainStep(network, objective, replace(TrainStepConfig(10), **settings), sync)

    with pytest.raises(ValueError, match="equally many rows: give a batch that the ranks divide"):
        build(random_network(torch.float32), DDP(weight=1.5))
    with pytest.raises(ValueError, match="esc compares the images of a batch, which augmentation changes"):
        build(random_network(torch.float32), augment=0.1)
