"""MeanFlow, alpha-Flow, consistency models, Shortcut, Flow Matching and diffusion against their definitions."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from soflow_core.guidance import IntervalGuidance, VelocityGuidance, drop_labels
from soflow_core.networks import DiT
from soflow_core.objectives import (
    OBJECTIVES,
    AlphaFlow,
    AlphaSchedule,
    Batch,
    ContinuousConsistency,
    Diffusion,
    Draws,
    EasyConsistency,
    ExplicitShortcut,
    FlowMatching,
    ImprovedConsistency,
    ImprovedMeanFlow,
    MeanFlow,
    Objective,
    Shortcut,
    SoFlow,
)
from soflow_core.objectives.total_derivative import DerivativeModel
from soflow_core.passes import Network, Passes, PassPolicy
from soflow_core.rows import row_mean, row_sum
from tests.support.random_networks import CONFIG, SHAPE, gradient, random_inputs, random_network

KEEP = torch.zeros(12, dtype=torch.bool)


def column(t: Tensor) -> Tensor:
    return t.reshape(-1, 1, 1, 1)


def central_derivative(
    network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, v: Tensor, h: float = 1e-5
) -> Tensor:
    """(F(x + h v, t + h, s) - F(x - h v, t - h, s)) / 2h."""
    with torch.no_grad():
        return (network(x + h * v, t + h, s, labels) - network(x - h * v, t - h, s, labels)) / (2 * h)


def meanflow_loss(objective: MeanFlow, network: Network, batch: Batch, draws: Draws) -> Tensor:
    """MeanFlow's loss row by row from its definition, with a difference quotient for du/dt."""
    t, s, labels, guidance = draws.t, draws.s, batch.labels, objective.guidance
    x_t = column(1 - t) * batch.x0 + column(t) * draws.noise
    v = draws.noise - batch.x0
    with torch.no_grad():
        seen = drop_labels(labels, draws.dropped)
        v_u, v_p = network(x_t, t, t, None), network(x_t, t, t, labels)
        guided = guidance.omega * v + (1 - guidance.omega - guidance.kappa) * v_u + guidance.kappa * v_p
        inside = (t >= guidance.start) & (t <= guidance.end) & ~draws.dropped
        v = torch.where(column(inside), guided, v)
        target = v - column(t - s) * central_derivative(network, x_t, t, s, seen, v)
    error = row_sum((network(x_t, t, s, seen) - target).square())
    return (error / (error.detach() + objective.weight_eps) ** objective.weight_power).mean()


def improved_meanflow_loss(
    objective: ImprovedMeanFlow, network: Network, batch: Batch, draws: Draws
) -> Tensor:
    """A(S) = S / sg(S + eps)^p of S = sum (V - v_g)^2, V = u + (t - s) sg(du/dt) along (u(x, t, t), 1, 0)."""
    t, s, labels, guidance = draws.t, draws.s, batch.labels, objective.guidance
    x_t = column(1 - t) * batch.x0 + column(t) * draws.noise
    v_g = draws.noise - batch.x0
    seen = None if labels is None else drop_labels(labels, draws.dropped)
    with torch.no_grad():
        own = network(x_t, t, t, seen)
        derivative = central_derivative(network, x_t, t, s, seen, own)
        if labels is not None:
            guided = v_g + (1 - 1 / guidance.scale) * (own - network(x_t, t, t, None))
            inside = (t >= guidance.start) & (t <= guidance.end) & ~draws.dropped
            v_g = torch.where(column(inside), guided, v_g)
    error = row_sum((network(x_t, t, s, seen) + column(t - s) * derivative - v_g).square())
    return (error / (error.detach() + objective.weight_eps) ** objective.weight_power).mean()


@pytest.mark.parametrize(
    "guidance",
    [IntervalGuidance(), IntervalGuidance(scale=3.0), IntervalGuidance(2.5, start=0.3, end=0.7, drop=0.4)],
    ids=["plain", "guided", "interval"],
)
@pytest.mark.parametrize("skip_unused", [True, False], ids=["skipping", "whole"])
@pytest.mark.parametrize("conditional", [True, False], ids=["labels", "no labels"])
def test_improved_meanflow_is_its_definition(
    guidance: IntervalGuidance, skip_unused: bool, conditional: bool
) -> None:
    objective = ImprovedMeanFlow(guidance=guidance, flow_matching_share=0.25, weight_power=0.75)
    network = random_network()
    batch, draws = random_inputs(objective, conditional=conditional, seed=2)
    found = objective.loss(network, batch, draws, 0, 1, PassPolicy(skip_unused=skip_unused)).loss
    expected = improved_meanflow_loss(objective, network, batch, draws)
    assert_close(found, expected, rtol=1e-7, atol=0)
    assert_close(gradient(found, network), gradient(expected, network), rtol=1e-5, atol=1e-8)


def test_a_scale_of_improved_meanflow_is_omega_one_and_kappa_of_meanflow() -> None:
    v_c, v_u, v_p = torch.randn(3, 4, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = IntervalGuidance(scale=4.0).velocity(v_c, v_u, v_p)
    theirs = VelocityGuidance(omega=1.0, kappa=0.75)
    assert theirs.scale == 4.0
    assert_close(ours, theirs.velocity(v_c, v_u, v_p))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.5}, "give 1 for no guidance"),
        ({"start": 0.6, "end": 0.4}, "interval 0.6 to 0.4 is empty"),
        ({"drop": 1.0}, "probability"),
    ],
)
def test_impossible_guidance_of_improved_meanflow_is_refused(
    settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        IntervalGuidance(**settings)


@pytest.mark.parametrize(
    "guidance",
    [
        VelocityGuidance(),
        VelocityGuidance(omega=2.0),
        VelocityGuidance(omega=0.75, kappa=0.75, end=0.8, drop=0.5),
        VelocityGuidance(omega=0.2, kappa=0.92, start=0.3, end=0.75),
    ],
    ids=["plain", "omega", "matched", "window"],
)
@pytest.mark.parametrize("skip_unused", [True, False], ids=["skipping", "whole"])
def test_meanflow_is_its_definition(guidance: VelocityGuidance, skip_unused: bool) -> None:
    objective = MeanFlow(guidance=guidance, flow_matching_share=0.5, weight_power=0.75)
    network = random_network()
    batch, draws = random_inputs(objective, seed=2)
    found = objective.loss(network, batch, draws, 0, 1, PassPolicy(skip_unused=skip_unused)).loss
    expected = meanflow_loss(objective, network, batch, draws)
    assert_close(found, expected, rtol=1e-7, atol=0)
    assert_close(gradient(found, network), gradient(expected, network), rtol=1e-5, atol=1e-8)


def test_meanflow_at_equal_times_is_flow_matching() -> None:
    network = random_network()
    objective = MeanFlow(flow_matching_share=1.0, weight_power=0.0)
    batch, draws = random_inputs(objective, conditional=False)
    expected = FlowMatching().loss(network, batch, draws, 0, 1).loss
    found = objective.loss(network, batch, draws, 0, 1).loss
    assert_close(found / batch.x0[0].numel(), expected)


def test_the_tangent_goes_along_the_velocity_at_a_fixed_end_time() -> None:
    """du/dt = v . du/dx + du/dt at fixed s; the network's second input t - s grows with t."""
    network = random_network()
    batch, draws = random_inputs(MeanFlow(flow_matching_share=0.0))
    v = draws.noise - batch.x0
    x = batch.x0 + column(draws.t) * v
    passes = Passes(network, PassPolicy())
    found = passes.total_derivative(x, draws.t, draws.s, batch.labels, v)
    assert_close(
        found, central_derivative(network, x, draws.t, draws.s, batch.labels, v), rtol=1e-6, atol=1e-7
    )
    wrong = (
        network(x, draws.t + 1e-5, draws.s + 1e-5, batch.labels)
        - network(x, draws.t - 1e-5, draws.s - 1e-5, batch.labels)
    ) / 2e-5
    assert not torch.allclose(found, wrong, rtol=1e-2)


def test_the_difference_quotient_is_the_derivative_up_to_the_square_of_its_step() -> None:
    network = random_network()
    batch, draws = random_inputs(MeanFlow(flow_matching_share=0.0))
    t, s = draws.t.clamp(0.2, 0.8), draws.s.clamp(max=0.1)
    arguments = (batch.x0, t, s, batch.labels, draws.noise - batch.x0)
    passes = Passes(network, PassPolicy())
    exact = passes.total_derivative(*arguments)
    errors = [(passes.total_derivative(*arguments, h) - exact).abs().max().item() for h in (2e-3, 1e-3)]
    assert errors[1] < 1e-3 * exact.abs().max().item()
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)


def test_the_difference_quotient_stays_between_s_and_the_noise() -> None:
    """Near the ends it is one-sided, and still the derivative as its step vanishes."""
    seen: list[Tensor] = []
    network = random_network()

    def watched(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        seen.append(t)
        return network(x, t, s, labels)

    t, s = torch.tensor([1.0, 0.9995, 0.5], dtype=torch.float64), torch.tensor([0.2, 0.3, 0.4999])
    x, v = torch.randn(2, 3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arguments = (x, t, s.double(), torch.arange(3), v)
    exact = Passes(network, PassPolicy()).total_derivative(*arguments)
    found = Passes(watched, PassPolicy()).total_derivative(*arguments, 1e-3)
    (times,) = seen
    assert times.max() <= 1
    assert (times.reshape(2, 3) >= s.double() - 1e-12).all()
    assert_close(found, exact, rtol=0.02, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize(
    "kind",
    [kind for kind in OBJECTIVES.values() if issubclass(kind, DerivativeModel)],
    ids=lambda kind: kind().method,
)
def test_a_difference_quotient_takes_the_place_of_the_jacobian_vector_product(kind: type[Objective]) -> None:
    needed: dict[Any, dict[str, Any]] = {
        AlphaFlow: {"schedule": AlphaSchedule("constant", value=0.0)},
        ContinuousConsistency: {"warmup_steps": 0},
        ExplicitShortcut: {"warmup_steps": 0},
    }
    settings = needed.get(kind, {})
    network = random_network()
    exact, quotient = kind(**settings), kind(derivative="finite_difference", difference=1e-4, **settings)
    assert (exact.uses_jvp, quotient.uses_jvp) == (True, False)
    batch, draws = random_inputs(exact)
    gradients = [gradient(o.loss(network, batch, draws, 0, 1).loss, network) for o in (exact, quotient)]
    assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)
    assert not torch.equal(gradients[1], gradients[0])


@pytest.mark.parametrize("difference", [0.0, -0.1, 0.6])
def test_an_impossible_difference_is_refused(difference: float) -> None:
    with pytest.raises(ValueError, match=f"difference is {difference}; it must be above 0"):
        MeanFlow(derivative="finite_difference", difference=difference)


def test_only_rows_with_two_times_pay_for_a_derivative() -> None:
    rows = []
    network = random_network()

    class Watched(Passes):
        def total_derivative(
            self,
            x: Tensor,
            t: Tensor,
            s: Tensor,
            labels: Tensor | None,
            velocity: Tensor,
            difference: float | None = None,
            scale: Tensor | None = None,
        ) -> Tensor:
            rows.append(len(x))
            return super().total_derivative(x, t, s, labels, velocity, difference, scale)

    objective = MeanFlow()
    batch, draws = random_inputs(objective, size=16)
    from soflow_core.objectives import meanflow

    original = meanflow.Passes
    meanflow.Passes = Watched
    try:
        objective.loss(network, batch, draws, 0, 1)
    finally:
        meanflow.Passes = original
    assert rows == [4]


def test_a_kernel_without_forward_mode_is_refused_and_avoided() -> None:
    network = random_network(torch.float32)
    batch, draws = random_inputs(MeanFlow(flow_matching_share=0.0), dtype=torch.float32)
    arguments = (batch.x0, draws.t, draws.s, batch.labels, draws.noise)
    assert Passes(network, PassPolicy()).total_derivative(*arguments).isfinite().all()

    def stubborn(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return network(x, t, s, labels)

    with pytest.raises(NotImplementedError, match="lacks the forward-mode derivative this method needs"):
        Passes(stubborn, PassPolicy()).total_derivative(*arguments)


def test_meanflow_drops_the_labels_of_the_first_rows() -> None:
    draws = MeanFlow().draw(torch.Generator().manual_seed(0), 64, SHAPE, conditional=True)
    count = int(draws.dropped.sum())
    assert 0 < count < 16
    assert draws.dropped[:count].all()
    counts = [
        int(MeanFlow().draw(torch.Generator().manual_seed(k), 64, (1, 1, 1), True).dropped.sum())
        for k in range(300)
    ]
    assert sum(counts) / 300 == pytest.approx(6.4, abs=0.5)


def test_alpha_flow_at_zero_is_meanflow_up_to_its_weight() -> None:
    network = random_network()
    guidance = VelocityGuidance(omega=0.8, kappa=0.4, end=0.7)
    alpha = AlphaFlow(
        flow_matching_share=0.5, schedule=AlphaSchedule("constant", value=0.0), guidance=guidance
    )
    mean = MeanFlow(
        flow_matching_share=0.5, guidance=guidance, weight_eps=alpha.weight_eps * batch_elements()
    )
    batch, draws = random_inputs(mean)
    draws = Draws(draws.noise, draws.t, draws.s, KEEP, draws.velocity_rows)
    ours = alpha.loss(network, batch, draws, 0, 1).loss
    assert_close(ours, mean.loss(network, batch, draws, 0, 1).loss)


def batch_elements() -> int:
    return SHAPE[0] * SHAPE[1] * SHAPE[2]


def test_alpha_flow_at_one_is_trajectory_flow_matching() -> None:
    """Its target is the velocity itself, whatever s."""
    network = random_network()
    objective = AlphaFlow(
        flow_matching_share=0.0, schedule=AlphaSchedule("constant", value=1.0), guidance=VelocityGuidance()
    )
    batch, draws = random_inputs(objective)
    draws = Draws(draws.noise, draws.t, draws.s, KEEP, 0)
    v = draws.noise - batch.x0
    x_t = batch.x0 + column(draws.t) * v
    expected = row_mean((network(x_t, draws.t, draws.s, batch.labels) - v.clamp(-4, 4)).square()).mean()
    assert_close(objective.loss(network, batch, draws, 0, 1).terms["average_mse"], expected)


def test_soflow_is_alpha_flow_with_alpha_the_middle_ratio() -> None:
    """q = -(u - [alpha v + (1 - alpha) u(x_l, l, s)]) / alpha, so the mean squares differ by alpha^2."""
    network = random_network()
    ratio = 0.05
    from soflow_core.guidance import Guidance
    from soflow_core.times import RatioSchedule

    soflow = SoFlow(
        flow_matching_share=0.0, schedule=RatioSchedule("constant", ratio, ratio), guidance=Guidance(scale=1)
    )
    alpha = AlphaFlow(
        flow_matching_share=0.0, schedule=AlphaSchedule("constant", value=ratio), guidance=VelocityGuidance()
    )
    batch, draws = random_inputs(soflow)
    x0, noise = batch.x0 / 3, draws.noise / 3
    draws = Draws(noise, draws.t.clamp(0.4, 0.9), draws.s.clamp(max=0.3), KEEP, 0)
    ours = soflow.loss(network, Batch(x0, batch.labels), draws, 0, 1).terms["consistency_mse"]
    theirs = alpha.loss(network, Batch(x0, batch.labels), draws, 0, 1).terms["average_mse"]
    assert_close(ours * ratio**2, theirs)


def test_alpha_flow_drops_labels_only_inside_its_window() -> None:
    """Rows whose label is dropped keep the guided target."""
    objective = AlphaFlow(
        flow_matching_share=0.0, guidance=VelocityGuidance(omega=0.5, kappa=0.5, start=0.4, end=0.7, drop=0.5)
    )
    draws = objective.draw(torch.Generator().manual_seed(0), 2000, (1, 1, 1), conditional=True)
    assert ((draws.t >= 0.4) & (draws.t <= 0.7))[draws.dropped].all()
    network = random_network()
    batch, draws = random_inputs(objective)
    inside = Draws(draws.noise, draws.t.clamp(0.45, 0.65), draws.s.clamp(max=0.4), ~KEEP, 0)
    x_t = column(1 - inside.t) * batch.x0 + column(inside.t) * inside.noise
    with torch.no_grad():
        v_u = network(x_t, inside.t, inside.t, None)
        target = (0.5 * (inside.noise - batch.x0) + 0.5 * v_u).clamp(-4, 4)
        mse = row_mean((network(x_t, inside.t, inside.s, None) - target).square()).mean()
    assert_close(objective.loss(network, batch, inside, 0, 10).terms["average_mse"], mse)


def test_the_continuous_consistency_gradient_is_the_normalized_tangent() -> None:
    """The gradient is that of -2 <F, g> / D with g = tangent / (rms + 0.1)."""
    network = random_network()
    objective = ContinuousConsistency(warmup_steps=100)
    batch, draws = random_inputs(objective)
    for step, warmup in ((0, 0.0), (25, 0.25), (1000, 1.0)):
        v, t = draws.noise - batch.x0, draws.t
        x = batch.x0 + column(t) * v
        zero = torch.zeros_like(t)
        prediction = network(x, t, zero, batch.labels)
        derivative = central_derivative(network, x, t, zero, batch.labels, v)
        tangent = v - prediction.detach() - warmup * column(t) * derivative
        normalized = tangent / (column(row_mean(tangent.square()).sqrt()) + 0.1)
        expected = gradient(-2 * row_mean(prediction * normalized).mean(), network)
        found = gradient(objective.loss(network, batch, draws, step, 2000).loss, network)
        assert_close(found, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "objective", [ImprovedConsistency(), EasyConsistency(huber=0.01)], ids=["ict", "ect"]
)
def test_discrete_consistency_compares_two_noise_levels_of_the_same_pair(objective: Objective) -> None:
    network = random_network()
    batch, draws = random_inputs(objective)
    sigma = draws.t / (1 - draws.t)
    if objective.method == "ict":
        grid = objective.grid(objective.levels(500, 1000)).double()
        upper = (sigma[:, None] >= grid).sum(1).clamp(1, len(grid) - 1)
        first, second, c = grid[upper], grid[upper - 1], 0.00054 * batch_elements() ** 0.5
        assert ((first >= sigma) & (second <= sigma)).all()
    else:
        first, second, c = sigma, objective.second_level(sigma, objective.gap(500, 1000)), 0.01
    outputs = []
    for level in (first, second):
        # x_sigma = x0 + sigma noise = x_t / (1 - t) with t = sigma / (1 + sigma).
        t = (level / (1 + level)).to(torch.float64)
        x = (batch.x0 + column(level) * draws.noise) * column(1 - t)
        outputs.append(x - column(t) * network(x, t, torch.zeros_like(t), batch.labels))
    distance = (row_sum((outputs[0] - outputs[1].detach()).square()) + c**2).sqrt() - c
    expected = (distance / (first - second)).mean()
    found = objective.loss(network, batch, draws, 500, 1000).loss
    assert_close(found, expected, rtol=2e-6, atol=0)
    assert_close(gradient(found, network), gradient(expected, network), rtol=1e-4, atol=1e-5)


def test_shortcut_targets_are_two_half_steps_of_the_teacher() -> None:
    network, teacher = random_network(), random_network(seed=1)
    objective = Shortcut(bootstrap_share=0.75, scale=2.0)
    batch, draws = random_inputs(objective)
    n = draws.velocity_rows
    assert n == 3
    steps = draws.t - draws.s
    assert_close(steps[:3], torch.full((3,), 1 / 128, dtype=torch.float64))
    assert_close(steps[3:10].sort(descending=True).values, 2.0 ** -torch.arange(7, dtype=torch.float64))
    assert_close((draws.t / steps).round(), draws.t / steps)
    found = objective.loss(network, batch, draws, 0, 1, PassPolicy(teacher=teacher))
    with torch.no_grad():
        x_t = column(1 - draws.t) * batch.x0 + column(draws.t) * draws.noise
        x, t, labels, half = x_t[n:], draws.t[n:], batch.labels[n:], steps[n:] / 2

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            v, v_u = teacher(x, t, t - half, labels), teacher(x, t, t - half, None)
            return torch.where(column(half == 1 / 128), v_u + 2 * (v - v_u), v)

        one = velocity(x, t)
        two = velocity((x - column(half) * one).clamp(-4, 4), t - half)
        target = ((one + two) / 2).clamp(-4, 4)
        seen = drop_labels(batch.labels, draws.dropped)
        error = row_mean((network(x_t, draws.t, draws.s, seen)[n:] - target).square()).mean()
        first = row_mean((network(x_t, draws.t, draws.s, seen) - (draws.noise - batch.x0)).square())[
            :n
        ].mean()
    assert_close(found.terms["bootstrap_mse"], error)
    assert_close(found.terms["velocity_mse"], first)
    assert not draws.dropped[n:].any()


def test_diffusion_predicts_the_noise_at_integer_steps() -> None:
    network = random_network()
    objective = Diffusion()
    batch, draws = random_inputs(objective)
    assert_close(draws.t, draws.t.round())
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)[draws.t.long()]
    x = column(alpha_bar.sqrt()) * batch.x0 + column((1 - alpha_bar).sqrt()) * draws.noise
    seen = drop_labels(batch.labels, draws.dropped)
    expected = (network(x, draws.t, draws.t, seen) - draws.noise).square().mean()
    assert_close(objective.loss(network, batch, draws, 0, 1).loss, expected, rtol=1e-6, atol=0)


def test_flow_matching_predicts_the_velocity_and_drops_labels() -> None:
    network = random_network()
    objective = FlowMatching(drop=0.5)
    batch, draws = random_inputs(objective)
    assert 0 < draws.dropped.sum() < 12
    x_t = column(1 - draws.t) * batch.x0 + column(draws.t) * draws.noise
    prediction = network(x_t, draws.t, draws.t, drop_labels(batch.labels, draws.dropped))
    expected = (prediction - (draws.noise - batch.x0)).square().mean()
    assert_close(objective.loss(network, batch, draws, 0, 1).loss, expected)


def test_methods_that_use_no_null_label_train_without_one() -> None:
    from dataclasses import replace

    network = DiT(replace(CONFIG, null_label=False))
    for cls in OBJECTIVES.values():
        objective = cls()
        if not objective.needs_null_label:
            batch, draws = random_inputs(objective, dtype=torch.float32)
            objective.loss(network, batch, draws, 0, 10).loss.backward()
