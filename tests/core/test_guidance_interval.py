"""Improved MeanFlow on guidance intervals that vary, which the network takes as a condition; and t - s as the only time."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from soflow_core.conformance import test_objective as objective_suite
from soflow_core.guidance import EndRange, IntervalGuidance, ScaleRange, drop_labels
from soflow_core.initial_weights import fit
from soflow_core.labels import NULL_LABEL
from soflow_core.networks import DiT, DiTConfig
from soflow_core.nfe import training_evaluations
from soflow_core.objectives import Batch, Draws, ImprovedMeanFlow, SoFlow
from soflow_core.passes import PassPolicy
from soflow_core.rows import row_sum
from soflow_core.settings import from_dict, to_dict
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_core.weights import Weights, WeightsError
from tests.support.gaussian import Gaussian, column, grid_points, rows_along
from tests.support.random_networks import CONFIG, SHAPE, gradient, random_inputs

GUIDANCE = IntervalGuidance(ScaleRange(1.0, 8.0), start=EndRange(0.0, 0.5), end=EndRange(0.5, 1.0), drop=0.3)
OBJECTIVE = ImprovedMeanFlow(guidance=GUIDANCE, flow_matching_share=0.25, weight_power=0.75)
CONDITIONED = replace(CONFIG, guidance_scale=True, guidance_interval=True)
ALONE = replace(CONFIG, difference_alone=True)
heads = pytest.mark.parametrize("head", [False, True], ids=["one head", "two heads"])


def filled(config: DiTConfig, dtype: torch.dtype = torch.float64) -> DiT:
    network = objective_suite.filled(config.build(), seed=0)
    assert isinstance(network, DiT)
    return network.to(dtype)


def inputs(objective: ImprovedMeanFlow, rows: int = 24) -> tuple[Batch, Draws]:
    """Rows of the objective's own draws in float64."""
    draws = objective.draw(torch.Generator().manual_seed(1), rows, SHAPE, conditional=True)
    batch, _ = random_inputs(objective, rows)
    assert draws.scale is not None
    tensors = {name: getattr(draws, name).double() for name in ("noise", "t", "s", "scale")}
    return batch, replace(draws, **tensors)


def test_both_ends_are_uniform_and_rows_that_have_no_interval_are_guided_at_all_times() -> None:
    draws = OBJECTIVE.draw(torch.Generator().manual_seed(0), 20_000, (1, 1, 1), conditional=True)
    alone = replace(OBJECTIVE, guidance=replace(GUIDANCE, start=0.0, end=1.0))
    before = alone.draw(torch.Generator().manual_seed(0), 20_000, (1, 1, 1), conditional=True)
    assert draws.scale is not None
    assert draws.dropped is not None
    for name in ("noise", "t", "s", "dropped"):
        assert torch.equal(getattr(draws, name), getattr(before, name))
    assert before.scale is not None
    assert torch.equal(draws.scale[:, 0], before.scale)
    whole = draws.dropped.clone()
    whole[: draws.velocity_rows] = True
    assert (draws.scale[whole, 1:] == torch.tensor([0.0, 1.0])).all()
    for values, low in ((draws.scale[~whole, 1], 0.0), (draws.scale[~whole, 2], 0.5)):
        share = ((values - low) / 0.5).sort().values
        assert (share - torch.linspace(0, 1, len(share))).abs().max() < 0.02
    assert OBJECTIVE.draw(None, 8, (1, 1, 1), conditional=False).scale is None


CONDITIONAL, UNCONDITIONAL = Gaussian(0.0, 0.3), Gaussian(0.0, 0.9)


def exact_network(x: Tensor, t: Tensor, s: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """u of the field that is w v^c + (1 - w) v^u for a <= t <= b and v^c at other times, for normal data of mean 0.

    The flow from t to s multiplies x by C_s / C_t, and between hi and lo, the part of [s, t] that is guided, by
    ((C_lo / C_hi) / (U_lo / U_hi))^(w - 1), with C and U the standard deviations of x_t with and without the label.
    """
    w, a, b = (column(each) for each in scale.unbind(1))
    t_, s_ = column(t), column(s)
    same, null = t_ == s_, column(labels) == NULL_LABEL
    lo, hi = (torch.maximum(torch.minimum(end, t_), s_) for end in (a, b))
    c, u = CONDITIONAL.spread, UNCONDITIONAL.spread
    factor = c(s_) / c(t_) * (c(lo) / c(hi) * u(hi) / u(lo)) ** (w - 1)
    inside = (t_ >= a) & (t_ <= b)
    v_c, v_u = CONDITIONAL.velocity(x, t), UNCONDITIONAL.velocity(x, t)
    velocity = torch.where(inside, w * v_c + (1 - w) * v_u, v_c)
    average = torch.where(same, velocity, (1 - factor) * x / torch.where(same, torch.ones_like(t_), t_ - s_))
    return torch.where(null, UNCONDITIONAL.network(x, t, s, None), average)


def test_the_flow_that_is_guided_in_each_rows_interval_is_a_fixed_point() -> None:
    x, t, s = grid_points()
    generator = torch.Generator().manual_seed(5)
    w, a, b = torch.rand(3, len(t), generator=generator, dtype=torch.float64)
    scale = torch.stack([1 + 7 * w, a / 2, (1 + b) / 2], dim=1)
    assert (t < scale[:, 1]).any(), "rows below their interval"
    assert (t > scale[:, 2]).any(), "rows above it, whose flow crosses it"
    batch, draws = rows_along(x, t, s, CONDITIONAL.velocity(x, t))
    batch = Batch(batch.x0, torch.zeros(len(t), dtype=torch.int64))
    pair = replace(draws, dropped=torch.zeros(len(t), dtype=torch.bool), scale=scale)
    objective = replace(OBJECTIVE, flow_matching_share=0.0)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, s: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        seen.append(scale[t == s])
        return exact_network(x, t, s, labels, scale)

    assert objective.loss(network, batch, pair, 0, 1).terms["average_mse"] < 1e-18
    # Velocities are asked for at all times.
    asked = torch.cat(seen)
    assert len(asked) > 0
    assert (asked[:, 1:] == torch.tensor([0.0, 1.0], dtype=torch.float64)).all()

    def of_all_times(x: Tensor, t: Tensor, s: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        return exact_network(
            x, t, s, labels, scale * torch.tensor([1.0, 0.0, 0.0]) + torch.tensor([0.0, 0.0, 1.0])
        )

    assert objective.loss(of_all_times, batch, pair, 0, 1).terms["average_mse"] > 1e-2


def defined_loss(objective: ImprovedMeanFlow, network: DiT, batch: Batch, draws: Draws) -> Tensor:
    """The paper's loss with w, t_min and t_max as inputs, and a quotient for du/dt.

    V = u(x_t, t, s; w, a, b) + (t - s) sg(du/dt) along v(x_t, t; w'), w' = w for a <= t <= b, else 1;
    v_g = v_c + (1 - 1/w') (v(x_t, t, y; w') - v(x_t, t, none; 1)), v at the interval 0 to 1.
    """
    assert draws.scale is not None
    t, s, h = draws.t, draws.s, 1e-5
    w, a, b = draws.scale.unbind(1)
    assert batch.labels is not None
    assert draws.dropped is not None
    seen, one = drop_labels(batch.labels, draws.dropped), torch.ones_like(w)
    x_t, v_g = column(1 - t) * batch.x0 + column(t) * draws.noise, draws.noise - batch.x0
    left = torch.where((t >= a) & (t <= b), w, one)
    head = ("velocity",) if objective.velocity_head else ()

    def velocity(labels: Tensor | None, w: Tensor) -> Tensor:
        return network(x_t, t, t, labels, torch.stack([w, 0 * w, one], dim=1), *head)

    with torch.no_grad():
        own = velocity(seen, left)
        guided = v_g + column(1 - 1 / left) * (own - velocity(None, one))
        v_g = torch.where(column(draws.dropped), v_g, guided)
        ahead, behind = (network(x_t + step * own, t + step, s, seen, draws.scale) for step in (h, -h))
    u = network(x_t, t, s, seen, draws.scale)
    errors = [row_sum((u + column(t - s) * (ahead - behind) / (2 * h) - v_g).square())]
    if objective.velocity_head:
        errors.append(row_sum((network(x_t, t, s, seen, draws.scale, "velocity") - v_g).square()))
    eps, power = objective.weight_eps, objective.weight_power
    return torch.stack([(e / (e.detach() + eps) ** power).mean() for e in errors]).sum()


@heads
def test_the_loss_is_its_definition(head: bool) -> None:
    objective = replace(OBJECTIVE, velocity_head=head)
    network = filled(replace(CONDITIONED, velocity_blocks=int(head)))
    batch, draws = inputs(objective)
    expected = defined_loss(objective, network, batch, draws)
    for policy in (PassPolicy(), PassPolicy(skip_unused=False), PassPolicy(uniform=True)):
        found = objective.loss(network, batch, draws, 0, 1, policy).loss
        assert_close(found, expected, rtol=1e-7, atol=0)
        assert_close(gradient(found, network), gradient(expected, network), rtol=1e-5, atol=1e-8)
    quotient = replace(objective, derivative="finite_difference", difference=1e-4)
    assert_close(quotient.loss(network, batch, draws, 0, 1).loss, expected, rtol=1e-4, atol=0)


@heads
def test_it_conforms_as_a_method(head: bool) -> None:
    objective = replace(OBJECTIVE, velocity_head=head)
    for step in objective_suite.STEPS:
        objective_suite.test_a_loss_draws_nothing_and_its_gradients_are_finite(objective, step)
    objective_suite.test_ranks_have_the_loss_and_gradient_of_one_process(objective, 3)
    objective_suite.test_rows_that_are_skipped_do_not_change_the_loss(objective)
    objective_suite.test_sharded_ranks_make_the_same_passes(objective)
    objective_suite.test_a_training_goes_on_from_its_state_bit_for_bit(objective)
    objective_suite.test_a_sample_depends_on_its_noise_and_label_alone(objective, 2)
    objective_suite.test_evaluations_are_counted_as_they_are_made(objective, 2)
    fixed = replace(objective, guidance=replace(GUIDANCE, start=0.0, end=1.0))
    assert training_evaluations(objective, 64) == training_evaluations(fixed, 64)


def test_samples_are_those_of_the_chosen_interval() -> None:
    network, labels = filled(CONDITIONED), torch.tensor([0, 1, 2])
    noise = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3, dtype=torch.float64)

    def step(x: Tensor, t: float, s: float, *condition: float) -> Tensor:
        scale = torch.tensor(condition, dtype=torch.float64).expand(3, 3)
        return x - (t - s) * network(x, t * ones, s * ones, labels, scale)

    chosen = replace(OBJECTIVE, sampling_scale=3.0, sampling_interval=(0.4, 0.6))
    expected = step(step(noise, 1.0, 0.5, 3.0, 0.4, 0.6), 0.5, 0.0, 3.0, 0.4, 0.6)
    assert_close(chosen.sample(network, noise, labels, 2), expected)
    assert OBJECTIVE.sampled_interval == (0.25, 0.75)
    assert_close(OBJECTIVE.sample(network, noise, labels, 1), step(noise, 1.0, 0.0, 8**0.5, 0.25, 0.75))
    unconditional = filled(replace(CONFIG, classes=None, null_label=False))
    assert OBJECTIVE.sample(unconditional, noise, None, 1).isfinite().all()


RANGES = {
    "scale": {"low": 1.0, "high": 8.0},
    "start": {"low": 0.0, "high": 0.5},
    "end": {"low": 0.5, "high": 1.0},
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": {**RANGES, "end": 1.0}}, "one end of the guidance interval is a range"),
        ({"guidance": {**RANGES, "scale": 2.0}}, "needs a guidance.scale that does"),
        ({"guidance": {**RANGES, "end": {"low": 0.4, "high": 1.0}}}, "0.5 to 0.4 is empty"),
        ({"guidance": {**RANGES, "start": {"low": 0.5, "high": 0.5}}}, "give 0 <= low < high <= 1"),
        ({"guidance": RANGES, "sampling_interval": [0.2, 0.4]}, "ends from 0.5 to 1.0"),
        ({"sampling_interval": [0.2, 0.8]}, "leave it out"),
    ],
)
def test_impossible_intervals_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(ImprovedMeanFlow, settings)


@pytest.mark.parametrize(
    "config",
    [
        CONDITIONED,
        ALONE,
        replace(CONDITIONED, difference_alone=True, condition_tokens=2, registers=1),
        replace(ALONE, classes=None, null_label=False),
    ],
    ids=["interval", "difference alone", "both, as tokens", "difference alone, no labels"],
)
def test_the_networks_conform_and_are_counted(config: DiTConfig) -> None:
    network = filled(config, torch.float32)
    assert from_dict(DiTConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert config.parameters() == sum(p.numel() for p in network.parameters())
    x, t, s = torch.zeros(1, *SHAPE), torch.full((1,), 0.5), torch.full((1,), 0.2)
    labels = None if config.classes is None else torch.zeros(1, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, t, s, labels)
    assert config.forward_flops() == counter.get_total_flops()
    assert not config.build()(torch.ones_like(x), t, s, labels).any(), "it starts at 0"
    assert config.small().build()


def test_the_interval_starts_at_nothing_and_scales_alone_are_those_of_all_times() -> None:
    t, s, labels = torch.rand(4), torch.zeros(4), torch.arange(4) % 3
    fresh = CONDITIONED.build()
    intervals = torch.tensor([[3.0, 0.2, 0.6]]).expand(4, 3)
    assert torch.equal(fresh.condition(t, s, labels, intervals), fresh.condition(t, s, labels, None))
    network = filled(CONDITIONED, torch.float32)
    scales = torch.full((4,), 3.0)
    whole = torch.tensor([[3.0, 0.0, 1.0]]).expand(4, 3)
    assert torch.equal(network.condition(t, s, labels, scales), network.condition(t, s, labels, whole))
    assert not torch.allclose(
        network.condition(t, s, labels, scales), network.condition(t, s, labels, intervals)
    )
    with pytest.raises(ValueError, match="takes no guidance interval"):
        filled(replace(CONFIG, guidance_scale=True), torch.float32).condition(t, s, labels, intervals)


def test_a_network_of_the_difference_alone_sees_no_time() -> None:
    network = filled(ALONE)
    x = torch.randn(4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t, labels = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=torch.float64), torch.arange(4) % 3
    assert_close(network(x, t, t - 0.25, labels), network(x, t + 0.05, t - 0.2, labels))
    assert not torch.allclose(network(x, t, t - 0.25, labels), network(x, t, t - 0.2, labels))
    assert not any(name.startswith("t_embedder") for name in network.state_dict())
    with pytest.raises(ValueError, match="difference_alone leaves t - s as the only time"):
        replace(ALONE, second_time="none")


def test_networks_and_methods_that_do_not_fit_are_refused() -> None:
    scaled = replace(CONFIG, guidance_scale=True)
    with pytest.raises(ValueError, match="needs a network with guidance_interval=True"):
        TrainStep(filled(scaled, torch.float32), OBJECTIVE, TrainStepConfig(1))
    with pytest.raises(ValueError, match="guidance_interval needs guidance_scale"):
        replace(CONFIG, guidance_interval=True)
    started = fit(Weights(scaled, OBJECTIVE, tensors={}), CONDITIONED, "improved_meanflow")
    assert started.notes == ("the guidance interval is a new condition without effect at the start",)
    with pytest.raises(WeightsError, match="guidance interval as a condition and this one has none"):
        fit(Weights(CONDITIONED, OBJECTIVE, tensors={}), scaled, "improved_meanflow")
    with pytest.raises(WeightsError, match="difference_alone true and this one has false"):
        fit(Weights(ALONE, SoFlow(), tensors={}), CONFIG, "soflow")
