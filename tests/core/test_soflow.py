"""SoFlow's loss against its definition: as a mean squared error, in its limits, and in six network calls."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.guidance import Guidance, drop_labels
from soflow_core.objectives import Batch, Draws, MeanFlow, SoFlow
from soflow_core.passes import Network, PassPolicy
from soflow_core.paths import PATHS
from soflow_core.rows import row_mean
from soflow_core.times import MINIMAL_GAP, RatioSchedule, middle_time
from soflow_six_calls import consistency_loss, six_call_loss
from tests.support.random_networks import gradient, random_inputs, random_network

UNGUIDED = Guidance(scale=1)
VARIANTS = [
    SoFlow(),
    SoFlow(guidance=UNGUIDED),
    SoFlow(guidance=Guidance(mix=1.0)),
    SoFlow(path="trigonometric", parameterization="trigonometric"),
    SoFlow(parameterization="trigonometric", weight_power=0.5),
    SoFlow(path="trigonometric", weight_power=0.0, guidance=Guidance(scale=2, decay_from=1.0, drop=0.5)),
    SoFlow(flow_matching_share=0.0),
    SoFlow(flow_matching_share=1.0),
]


def name(objective: SoFlow) -> str:
    guidance = objective.guidance
    parts = [objective.path, objective.parameterization, f"p{objective.weight_power}", f"w{guidance.scale}"]
    return "-".join([*parts, f"m{guidance.mix}", f"share{objective.flow_matching_share}"])


@pytest.mark.parametrize("conditional", [True, False], ids=["labels", "no-labels"])
@pytest.mark.parametrize("objective", VARIANTS, ids=name)
def test_three_calls_give_the_numbers_of_six(objective: SoFlow, conditional: bool) -> None:
    network = random_network()
    batch, draws = random_inputs(objective, size=16, conditional=conditional)
    expected = six_call_loss(objective, network, batch, draws, 300, 1000)
    for skip_unused in (True, False):
        policy = PassPolicy(skip_unused=skip_unused)
        loss = objective.loss(network, batch, draws, 300, 1000, policy).loss
        assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        assert_close(gradient(loss, network), gradient(expected, network), rtol=1e-9, atol=1e-12)


class Counted:
    """A network that counts the rows it is given, with and without gradient."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.calls = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        return self.network(x, t, s, labels)


def test_a_guided_step_is_three_calls() -> None:
    objective = SoFlow()
    batch, draws = random_inputs(objective, size=16)
    counted = Counted(random_network())
    objective.loss(counted, batch, draws, 0, 10, PassPolicy(skip_unused=False))
    assert counted.calls == [(16 + 4, False), (16, True), (4, False)]


def test_rows_that_do_not_matter_are_left_out() -> None:
    objective = SoFlow()
    batch, draws = random_inputs(objective, size=16)
    dropped = torch.zeros(16, dtype=torch.bool)
    dropped[[0, 1, 13]] = True
    s = draws.s.clone()
    s[14] = draws.t[14] - MINIMAL_GAP
    counted = Counted(random_network())
    objective.loss(counted, batch, Draws(draws.noise, draws.t, s, dropped, 12), 0, 10)
    degenerate = int((draws.s[12:] >= draws.t[12:] - MINIMAL_GAP).sum())
    assert counted.calls == [(16 + 4 - 4, False), (16, True), (4 - 1 - degenerate, False)]


def test_mixed_precision_keeps_the_quotient_exact() -> None:
    """Guidance and Flow Matching in bfloat16 move the loss a little; the consistency pair stays float32."""
    objective = SoFlow(guidance=UNGUIDED, weight_power=0.0)
    network = random_network(torch.float32)
    batch, draws = random_inputs(objective, size=16, dtype=torch.float32)
    full = objective.loss(network, batch, draws, 999, 1000)
    mixed = objective.loss(network, batch, draws, 999, 1000, PassPolicy("mixed"))
    half = objective.loss(network, batch, draws, 999, 1000, PassPolicy("bfloat16"))
    assert_close(mixed.terms["consistency_mse"], full.terms["consistency_mse"], rtol=1e-4, atol=0)
    assert_close(mixed.terms["velocity_mse"], full.terms["velocity_mse"], rtol=0.02, atol=0)
    assert mixed.terms["velocity_mse"] != full.terms["velocity_mse"]
    assert abs(half.terms["consistency_mse"] / full.terms["consistency_mse"] - 1) > 0.02
    assert {full.loss.dtype, mixed.loss.dtype, half.loss.dtype} == {torch.float32}


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("parameterization", ["euler", "trigonometric"])
@pytest.mark.parametrize("path", ["linear", "trigonometric"])
def test_the_inner_product_has_the_gradient_of_the_weighted_distance(
    path: str, parameterization: str, power: float
) -> None:
    """M = W |f_t - sg f_l|^2 / (2 D |b| (t - l))."""
    objective = SoFlow(
        flow_matching_share=0.0,
        weight_power=power,
        path=path,
        parameterization=parameterization,
        guidance=UNGUIDED,
    )
    network = random_network()
    batch, draws = random_inputs(objective)
    loss = objective.loss(network, batch, draws, 500, 1000).loss
    t, s = draws.t, draws.s
    middle = middle_time(t, s, objective.schedule.ratio(500, 1000))
    point = PATHS.named(path)(t)
    x_t, velocity = point.state(batch.x0, draws.noise), point.velocity(batch.x0, draws.noise)
    f_t = objective.solution(network, x_t, t, s, batch.labels)
    with torch.no_grad():
        x_l = x_t + velocity * (middle - t).reshape(-1, 1, 1, 1)
        f_l = objective.solution(network, x_l, middle, s, batch.labels)
        mse = row_mean((f_t - f_l).square()) / (t - middle) ** 2
        weight = 1 / (mse + 0.01) ** power
    b = objective.coefficients(t, s).b.abs()
    halved = (weight * row_mean((f_t - f_l).square()) / (2 * b * (t - middle))).mean()
    assert_close(gradient(loss, network), gradient(halved, network), rtol=1e-9, atol=1e-13)


def test_as_r_goes_to_zero_it_is_half_the_meanflow_gradient() -> None:
    network = random_network()
    ratio = 1e-5
    soflow = SoFlow(
        flow_matching_share=0.0, schedule=RatioSchedule("constant", ratio, ratio), guidance=UNGUIDED
    )
    batch, draws = random_inputs(soflow, conditional=False)
    t = draws.t.clamp(0.4, 0.9)
    draws = Draws(draws.noise, t, draws.s.clamp(max=0.25), None, 0)
    size = batch.x0[0].numel()
    meanflow = MeanFlow(flow_matching_share=0.0, weight_eps=0.01 * size)
    ours = gradient(_without_floor(soflow, network, batch, draws, ratio), network)
    theirs = gradient(meanflow.loss(network, batch, draws, 0, 1).loss, network)
    assert (ours.norm() / theirs.norm()).item() == pytest.approx(0.5, abs=1e-4)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item() == pytest.approx(1, abs=1e-6)


def _without_floor(objective: SoFlow, network: Network, batch: Batch, draws: Draws, ratio: float) -> Tensor:
    """The consistency branch at a middle time nearer to t than the training's smallest gap."""
    t, s = draws.t, draws.s
    return consistency_loss(
        objective, network, batch.x0, draws.noise, (t, t + (s - t) * ratio, s), None, None
    ).mean()


@pytest.mark.parametrize("ratio", [0.1, 0.01])
def test_at_training_ratios_it_is_near_half_the_meanflow_gradient(ratio: float) -> None:
    network = random_network()
    soflow = SoFlow(
        flow_matching_share=0.0, schedule=RatioSchedule("constant", ratio, ratio), guidance=UNGUIDED
    )
    batch, draws = random_inputs(soflow, conditional=False)
    draws = Draws(draws.noise, draws.t.clamp(0.4, 0.9), draws.s.clamp(max=0.25), None, 0)
    meanflow = MeanFlow(flow_matching_share=0.0, weight_eps=0.01 * batch.x0[0].numel())
    ours = gradient(soflow.loss(network, batch, draws, 0, 1).loss, network)
    theirs = gradient(meanflow.loss(network, batch, draws, 0, 1).loss, network)
    assert (ours.norm() / theirs.norm()).item() == pytest.approx(0.5, abs=3 * ratio)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item() > 1 - 3 * ratio


def test_where_s_is_clamped_it_is_half_the_flow_matching_gradient() -> None:
    objective = SoFlow(guidance=UNGUIDED)
    network = random_network()
    batch, draws = random_inputs(objective)
    t = draws.t
    pair = Draws(draws.noise, t, t - MINIMAL_GAP, draws.dropped, 0)
    single = Draws(draws.noise, t, t, draws.dropped, len(t))
    ours = gradient(objective.loss(network, batch, pair, 0, 1).loss, network)
    theirs = gradient(objective.loss(network, batch, single, 0, 1).loss, network)
    assert (ours.norm() / theirs.norm()).item() == pytest.approx(0.5, abs=1e-3)
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0).item() == pytest.approx(1, abs=1e-6)


def test_mixing_scales_the_flow_matching_residual() -> None:
    batch, draws = random_inputs(SoFlow(), conditional=True)
    draws = Draws(draws.noise, draws.t, draws.t, torch.zeros(12, dtype=torch.bool), 12)
    network = random_network()
    errors = {
        mix: SoFlow(guidance=Guidance(mix=mix)).loss(network, batch, draws, 0, 1).terms["velocity_mse"]
        for mix in (1.0, 0.25)
    }
    assert_close(errors[0.25], 0.25**2 * errors[1.0])


def test_mixing_moves_the_consistency_target_linearly() -> None:
    """Targets at m and at 1 - m add up to v_g + v_p, so the quotients do too, where F_l does not matter."""
    batch, draws = random_inputs(SoFlow())
    t = draws.t
    draws = Draws(draws.noise, t, t - MINIMAL_GAP, torch.zeros(12, dtype=torch.bool), 0)
    network = random_network()
    path = PATHS.named("linear")(t)
    x_t, v_c = path.state(batch.x0, draws.noise), path.velocity(batch.x0, draws.noise)
    with torch.no_grad():
        v_p, v_u = network(x_t, t, t, batch.labels), network(x_t, t, t, None)
        prediction = network(x_t, t, draws.s, batch.labels)
    for mix in (1.0, 0.6, 0.25):
        objective = SoFlow(weight_power=0.0, guidance=Guidance(2.0, mix, 0.1, decay_from=1.0))
        found = objective.loss(network, batch, draws, 0, 1).loss
        target = mix * (2 * v_c - v_u) + (1 - mix) * v_p
        # With s = l, f_t - f_l = (t - l) (v_g - F_t), and sgn(b) = -1.
        assert_close(found, -row_mean(prediction * (target - prediction)).mean(), rtol=1e-6, atol=1e-9)


def test_a_zero_network_sees_the_guided_velocity_itself() -> None:
    network = random_network()
    with torch.no_grad():
        network.final_layer.linear.weight.zero_()
        network.final_layer.linear.bias.zero_()
    objective = SoFlow(guidance=UNGUIDED)
    batch, draws = random_inputs(objective)
    v_c = draws.noise - batch.x0
    terms = objective.loss(network, batch, draws, 0, 1).terms
    n = draws.velocity_rows
    assert_close(terms["velocity_mse"], row_mean(v_c[:n].square()).mean())
    assert_close(terms["consistency_mse"], row_mean(v_c[n:].square()).mean(), rtol=1e-6, atol=0)


def test_with_full_power_the_velocity_loss_is_one_at_large_errors() -> None:
    objective = SoFlow(weight_eps=1e-9, flow_matching_share=1.0, guidance=UNGUIDED)
    batch, draws = random_inputs(objective)
    assert objective.loss(random_network(), batch, draws, 0, 1).loss.item() == pytest.approx(1, abs=1e-6)


def test_the_teacher_and_the_target_carry_no_gradient() -> None:
    """Only the prediction at (x_t, t, s) has a gradient: a network that is constant there has none."""
    objective = SoFlow(weight_power=0.0, guidance=UNGUIDED, flow_matching_share=0.0)
    batch, draws = random_inputs(objective)
    elsewhere = torch.ones((), dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, t: Tensor, s: Tensor, _labels: Tensor | None) -> Tensor:
        asked = (t == draws.t) & (s == draws.s) if len(t) == len(draws.t) else torch.zeros_like(t) > 0
        return torch.where(asked.reshape(-1, 1, 1, 1), x.detach(), elsewhere * x)

    result = objective.loss(network, batch, draws, 0, 10, PassPolicy(skip_unused=False))
    (found,) = torch.autograd.grad(result.loss, elsewhere, allow_unused=True)
    assert found is None or found == 0


def test_the_first_rows_are_flow_matching_at_any_number_of_ranks() -> None:
    objective = SoFlow()
    draws = objective.draw(torch.Generator().manual_seed(0), 32, (1, 2, 2), conditional=True)
    assert draws.velocity_rows == 24
    assert torch.equal(draws.t[:24], draws.s[:24])
    assert (draws.s[24:] < draws.t[24:]).all()
    for world in (2, 3, 5):
        parts = [draws.rows(rank, world) for rank in range(world)]
        assert sum(part.velocity_rows for part in parts) == 24
        for part in parts:
            n = part.velocity_rows
            assert torch.equal(part.t[:n], part.s[:n])
            assert (part.s[n:] < part.t[n:]).all()
        assert torch.equal(parts[1].noise, draws.noise[1::world])


def test_draws_follow_the_settings() -> None:
    draws = SoFlow().draw(torch.Generator().manual_seed(0), 100_000, (1, 1, 1), conditional=True)
    n = draws.velocity_rows
    logits = torch.logit(draws.t.double())
    assert (logits[:n].mean().item(), logits[:n].std().item()) == pytest.approx((-0.2, 1.0), abs=0.02)
    assert (logits[n:].mean().item(), logits[n:].std().item()) == pytest.approx((0.2, 0.8), abs=0.02)
    assert draws.dropped.double().mean().item() == pytest.approx(0.1, abs=0.01)
    clamped = (draws.s[n:] >= draws.t[n:] - 1.01 * MINIMAL_GAP).double().mean().item()
    assert clamped == pytest.approx(0.145, abs=0.006)


def test_labels_need_draws_that_say_which_are_dropped() -> None:
    objective = SoFlow()
    batch, draws = random_inputs(objective)
    bare = Draws(draws.noise, draws.t, draws.s, None, draws.velocity_rows)
    with pytest.raises(ValueError, match="draw with conditional=True"):
        objective.loss(random_network(), batch, bare, 0, 1)


def test_without_guidance_labels_are_never_dropped() -> None:
    objective = SoFlow(guidance=UNGUIDED)
    network = random_network()
    batch, draws = random_inputs(objective)
    assert draws.dropped is None
    every = Draws(draws.noise, draws.t, draws.s, torch.ones(12, dtype=torch.bool), draws.velocity_rows)
    loss = objective.loss(network, batch, draws, 0, 1).loss
    assert torch.equal(objective.loss(network, batch, every, 0, 1).loss, loss)
    nulled = Batch(batch.x0, drop_labels(batch.labels, every.dropped))
    assert not torch.equal(objective.loss(network, nulled, draws, 0, 1).loss, loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flow_matching_share": 1.2}, "share from 0 to 1"),
        ({"weight_power": -1.0}, "or more"),
        ({"weight_eps": 0.0}, "above 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoFlow(**settings)
