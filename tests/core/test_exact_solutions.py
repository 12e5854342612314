"""Objectives with the exact solution of simple data: residuals vanish, at the rate they must.

`test_oracle_...` check the exact functions themselves, which are part of the tests.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from soflow_core.guidance import Guidance, IntervalGuidance, VelocityGuidance
from soflow_core.networks import NULL_LABEL
from soflow_core.objectives import (
    AlphaFlow,
    AlphaSchedule,
    Batch,
    ContinuousConsistency,
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
from soflow_core.times import RatioSchedule
from tests.support.gaussian import SHAPE, Gaussian, Mixture, column, grid_points, rows_along, runge_kutta

UNGUIDED = Guidance(scale=1)
DATA = [Gaussian(), Gaussian(0.0, 1.0), Gaussian(-1.0, 0.1)]


def constant_ratio(ratio: float, **settings: Any) -> SoFlow:
    settings = {"guidance": UNGUIDED, "weight_power": 0.0, **settings}
    return SoFlow(schedule=RatioSchedule("constant", ratio, ratio), **settings)


@pytest.mark.parametrize("data", [*DATA, Mixture()], ids=str)
def test_oracle_solution_solves_the_ode_of_the_oracle_velocity(data: Gaussian | Mixture) -> None:
    x, t, s = grid_points(20)
    x = x.clamp(-2, 2)
    assert_close(data.solution(x, t, s), runge_kutta(data.velocity, x, t, s), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("data", [*DATA, Mixture()], ids=str)
def test_oracle_solution_is_a_semigroup(data: Gaussian | Mixture) -> None:
    x, t, s = grid_points(20)
    x = x.clamp(-2, 2)
    middle = s + 0.3 * (t - s)
    assert_close(data.solution(data.solution(x, t, middle), middle, s), data.solution(x, t, s))


def test_oracle_velocity_is_the_regression_of_sample_velocities() -> None:
    data, t = Gaussian(), torch.tensor([0.4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x0 = data.mean + data.std * torch.randn(400_000, generator=generator, dtype=torch.float64)
    x1 = torch.randn(400_000, generator=generator, dtype=torch.float64)
    x, v = 0.6 * x0 + 0.4 * x1, x1 - x0
    residual = v - data.velocity(x.reshape(-1, 1, 1, 1), t).flatten()
    for moment in (torch.ones_like(x), x, x**2):
        assert (residual * moment).mean().abs() < 5e-3
    assert residual.var().item() == pytest.approx(data.std**2 / data.spread(t).item() ** 2, rel=0.01)


# Velocity field in the place of the sample velocity


def test_flow_matching_of_the_exact_velocity_is_zero() -> None:
    data, (x, t, _) = Gaussian(), grid_points()
    batch, draws = rows_along(x, t, t, data.velocity(x, t), velocity_rows=len(t))
    for objective in (FlowMatching(), SoFlow(guidance=UNGUIDED), MeanFlow()):
        assert objective.loss(data.network, batch, draws, 0, 1).terms["velocity_mse"] < 1e-25


@pytest.mark.parametrize("data", [Gaussian(), Mixture()], ids=str)
def test_the_quotient_of_the_exact_solution_vanishes_with_r(data: Gaussian | Mixture) -> None:
    x, t, s = grid_points()
    x = x.clamp(-2, 2)
    batch, draws = rows_along(x, t, s, data.velocity(x, t))
    sizes = []
    for ratio in (0.1, 0.01, 0.001):
        loss = constant_ratio(ratio).loss(data.network, batch, draws, 0, 1)
        sizes.append(loss.terms["consistency_mse"].sqrt().item())
    assert sizes[0] < 0.2
    assert sizes[1] / sizes[0] == pytest.approx(0.1, rel=0.15)
    assert sizes[2] / sizes[1] == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize("parameterization", ["euler", "trigonometric"])
@pytest.mark.parametrize("path", ["linear"])
def test_every_parameterization_holds_the_same_exact_solution(parameterization: str, path: str) -> None:
    data, (x, t, s) = Gaussian(), grid_points()
    objective = constant_ratio(0.001, parameterization=parameterization, path=path)

    def network(x: Tensor, t: Tensor, s: Tensor, _labels: Tensor | None) -> Tensor:
        """F = (f - a x) / b, and F = v / b_s where s = t."""
        coefficients = objective.coefficients(t, s)
        same = column(t) == column(s)
        b = torch.where(same, column(coefficients.db_ds), column(coefficients.b))
        top = torch.where(same, data.velocity(x, t), data.solution(x, t, s) - column(coefficients.a) * x)
        return top / b

    assert_close(objective.solution(network, x, t, s, None), data.solution(x, t, s))
    assert_close(objective.velocity(network, x, t, None), data.velocity(x, t))
    batch, draws = rows_along(x, t, s, data.velocity(x, t))
    assert objective.loss(network, batch, draws, 0, 1).terms["consistency_mse"] < 1e-5


def test_the_meanflow_identity_holds_for_the_exact_average_velocity() -> None:
    data, (x, t, s) = Gaussian(), grid_points()
    batch, draws = rows_along(x, t, s, data.velocity(x, t))
    assert MeanFlow().loss(data.network, batch, draws, 0, 1).terms["average_mse"] < 1e-22
    limit = AlphaFlow(schedule=AlphaSchedule("constant", value=0.0))
    assert limit.loss(data.network, batch, draws, 0, 1).terms["average_mse"] < 1e-22


def test_of_the_exact_average_velocity_v_is_the_velocity_at_any_end_time() -> None:
    """V = u + (t - s) du/dt along u(x, t, t), so what is left of the loss is the variance of sample velocities.

    MeanFlow's du/dt goes along the sample's velocity, which adds to it.
    """
    data, (x, t, s) = Gaussian(), grid_points()
    v_c = data.velocity(x, t) + torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    batch, draws = rows_along(x, t, s, v_c)
    floor = (v_c - data.velocity(x, t)).square().mean()
    found = ImprovedMeanFlow().loss(data.network, batch, draws, 0, 1).terms["average_mse"]
    assert_close(found, floor, rtol=1e-12, atol=0)
    assert (MeanFlow().loss(data.network, batch, draws, 0, 1).terms["average_mse"] / floor - 1).abs() > 0.2


@pytest.mark.parametrize("objective", [MeanFlow, ImprovedMeanFlow], ids=lambda kind: kind().method)
def test_with_a_difference_quotient_the_exact_residual_vanishes_with_its_square(
    objective: type[MeanFlow | ImprovedMeanFlow],
) -> None:
    data, (x, t, s) = Gaussian(), grid_points()
    t, s = t.clamp(0.2, 0.9), s.clamp(max=0.1)
    batch, draws = rows_along(x, t, s, data.velocity(x, t))
    sizes = [
        objective(derivative="finite_difference", difference=h)
        .loss(data.network, batch, draws, 0, 1)
        .terms["average_mse"]
        .sqrt()
        .item()
        for h in (0.02, 0.01)
    ]
    assert sizes[1] < 1e-2
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.1)


def test_the_exact_alpha_flow_residual_vanishes_with_alpha_squared() -> None:
    data, (x, t, s) = Gaussian(), grid_points()
    batch, draws = rows_along(x / 2, t, s, data.velocity(x / 2, t))
    sizes = [
        AlphaFlow(schedule=AlphaSchedule("constant", value=alpha))
        .loss(data.network, batch, draws, 0, 1)
        .terms["average_mse"]
        .sqrt()
        .item()
        for alpha in (0.02, 0.01)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(4, rel=0.1)


def test_the_continuous_consistency_tangent_of_the_exact_function_is_zero() -> None:
    data, (x, t, _) = Gaussian(), grid_points()
    batch, draws = rows_along(x, t, torch.zeros_like(t), data.velocity(x, t))
    loss = ContinuousConsistency(warmup_steps=0).loss(data.network, batch, draws, 0, 1)
    assert loss.terms["tangent_mse"] < 1e-22


def test_two_half_steps_of_the_exact_average_velocity_are_the_whole_step() -> None:
    data = Gaussian(0.2, 0.5)
    objective = Shortcut(bootstrap_share=1.0)
    draws = objective.draw(torch.Generator().manual_seed(0), 70, SHAPE, conditional=False)
    draws = Draws(draws.noise.double(), draws.t.double(), draws.s.double(), None, 0)
    batch = Batch(data.mean + data.std * torch.randn(70, *SHAPE, dtype=torch.float64).clamp(-2, 2))
    assert objective.loss(data.network, batch, draws, 0, 1).terms["bootstrap_mse"] < 1e-25


@pytest.mark.parametrize("objective", [ImprovedConsistency(), EasyConsistency()], ids=lambda o: o.method)
def test_discrete_consistency_of_the_exact_function_vanishes(objective: Objective) -> None:
    data, (x, t, _) = Gaussian(), grid_points()
    batch, draws = rows_along(x, t, torch.zeros_like(t), data.velocity(x, t))
    early, late = (objective.loss(data.network, batch, draws, k, 1000) for k in (0, 999))
    assert late.terms["consistency_mse"] < 1e-3 * early.terms["consistency_mse"]


# One datum: every sample moves straight to it


@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(),
        SoFlow(guidance=UNGUIDED),
        SoFlow(guidance=UNGUIDED, schedule=RatioSchedule("constant", 1.0, 1.0)),
        MeanFlow(),
        MeanFlow(derivative="finite_difference"),
        ImprovedMeanFlow(),
        ExplicitShortcut(zero_steps=0, warmup_steps=0),
        AlphaFlow(schedule=AlphaSchedule("constant", value=0.3)),
        AlphaFlow(schedule=AlphaSchedule("constant", value=0.0)),
        ImprovedConsistency(),
        EasyConsistency(),
        ContinuousConsistency(warmup_steps=0),
        Shortcut(),
    ],
    ids=lambda o: o.method,
)
def test_of_a_single_datum_every_loss_is_zero(objective: Objective) -> None:
    datum = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64).reshape(1, *SHAPE)

    def network(x: Tensor, t: Tensor, _s: Tensor, _labels: Tensor | None) -> Tensor:
        return (x - datum) / column(t)

    draws = objective.draw(torch.Generator().manual_seed(0), 64, SHAPE, conditional=False)
    noise = draws.noise.double().clamp(-2, 2)
    draws = replace(draws, noise=noise, t=draws.t.double(), s=draws.s.double())
    result = objective.loss(network, Batch(datum.expand(64, -1, -1, -1)), draws, 0, 1)
    for name, value in result.terms.items():
        if name.endswith("_mse"):
            assert value < 1e-14, name


# The discrete objective's own fixed point


def euler_chain(data: Gaussian, x: Tensor, t: Tensor, s: Tensor, ratio: float, gap: float = 1e-4) -> Tensor:
    """Euler steps of the exact velocity at t, l(t), l(l(t)), ...: the minimum of SoFlow's objective.

    The last step is from within the gap to s, where f(x, l, s) = x.
    """
    t = t.clone()
    while bool((t > s).any()):
        middle = torch.minimum(t + (s - t) * ratio, t - gap)
        middle = torch.where(middle - s < 1e-12, s, middle)
        moving = t > s
        step = torch.where(moving, torch.maximum(middle, s) - t, torch.zeros_like(t))
        x = x + column(step) * data.velocity(x, torch.where(moving, t, torch.ones_like(t)))
        t = torch.where(moving, t + step, t)
    return x


def factor_gradient(
    objective: SoFlow,
    std: float,
    factor: Callable[[Tensor, Tensor], Tensor],
    t: Tensor,
    s: Tensor,
    error: Tensor | float = 0.0,
) -> Tensor:
    """(B,): expected gradient of the loss of rows t, s for the factor c of f(x, t, s) = c x, of data N(0, std^2).

    The network's factors are factor(t, s), but in the rows' own times too large by the share `error`. Loss and
    gradient are quadratic in data and noise, so four pairs with their second moments are as good as all.
    """
    own = ((1 + error) * factor(t, s)).requires_grad_()

    def network(x: Tensor, at: Tensor, s: Tensor, _labels: Tensor | None) -> Tensor:
        moved = column(own if torch.equal(at, t) else factor(at, s))
        gap = column(at - s)
        return torch.where(gap < 1e-12, 0, (1 - moved) / gap) * x

    signs = torch.tensor([[1, 1, -1, -1], [1, -1, 1, -1]], dtype=t.dtype).reshape(2, 1, *SHAPE)
    x0, x1 = (std * signs[0]).expand(len(t), *SHAPE), signs[1].expand(len(t), *SHAPE)
    loss = objective.loss(network, Batch(x0), Draws(x1, t, s, None, 0), 0, 1).loss
    return torch.autograd.grad(loss, own)[0] * len(t)


FIXED_POINT = {
    0.1: {1.0: 0.0, 0.5: 0.0818, 0.1: 0.0970, 0.01: 0.0997, 0.002: 0.0999},
    0.5: {1.0: 0.0, 0.5: 0.3648, 0.1: 0.4770, 0.01: 0.4978, 0.002: 0.4996},
    1.0: {1.0: 0.0, 0.5: 0.6200, 0.1: 0.9344, 0.01: 0.9936, 0.002: 0.9987},
}
"""Standard deviation of the data -> r -> f(x, 1, 0) / x."""


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1, 0.01, 0.002])
@pytest.mark.parametrize("std", FIXED_POINT)
def test_one_step_of_the_fixed_point_shrinks_the_data_by_known_factors(std: float, ratio: float) -> None:
    """The objective's expected gradient vanishes at the factors of the chain of Euler steps, leads back to them from
    both sides, and is not 0 at those of the exact solution.
    """
    data, objective = Gaussian(0.0, std), constant_ratio(ratio)
    _, t, s = grid_points(6)
    t, s = torch.cat([t.new_ones(1), t]), torch.cat([s.new_zeros(1), s])

    def chain(t: Tensor, s: Tensor) -> Tensor:
        return euler_chain(data, torch.ones_like(column(t)), t, s, ratio).flatten()

    def exact(t: Tensor, s: Tensor) -> Tensor:
        return data.spread(s) / data.spread(t)

    errors = torch.tensor([0, 0.01, -0.01], dtype=t.dtype).repeat_interleave(len(t))
    at, above, below = factor_gradient(objective, std, chain, t.repeat(3), s.repeat(3), errors).chunk(3)
    assert chain(t[:1], s[:1]).item() == pytest.approx(FIXED_POINT[std][ratio], abs=5.1e-5)
    assert at.abs().max() < 1e-10
    assert factor_gradient(objective, std, exact, t, s).abs().max() > 1e-5
    if ratio < 1:
        # At r = 1 the one-step factor is 0, of which a share is nothing.
        assert (above > 0).all()
        assert (below < 0).all()


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1])
def test_the_fixed_point_of_the_objective_is_the_chain_of_euler_steps(ratio: float) -> None:
    data, (x, t, s) = Gaussian(0.0, 0.5), grid_points(40)

    def network(x: Tensor, t: Tensor, s: Tensor, _labels: Tensor | None) -> Tensor:
        still = column(t - s) < 1e-12
        gap = torch.where(still, torch.ones_like(column(t)), column(t - s))
        chain = euler_chain(data, x, t, s, ratio)
        return torch.where(still, data.velocity(x, t), (x - chain) / gap)

    batch, draws = rows_along(x, t, s, data.velocity(x, t))
    loss = constant_ratio(ratio).loss(network, batch, draws, 0, 1)
    assert loss.terms["consistency_mse"] < 1e-14


# Guidance


def test_guided_training_settles_on_the_guided_flow() -> None:
    """v = w v_c + (1 - w) v_u multiplies the spreads: f = (S^c_s / S^c_t)^w (S^u_s / S^u_t)^(1 - w) x for
    zero means.
    """
    conditional, unconditional, scale = Gaussian(0.0, 0.3), Gaussian(0.0, 0.9), 2.5
    x, t, s = grid_points()

    def solution(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        c = conditional.spread(column(s)) / conditional.spread(column(t))
        u = unconditional.spread(column(s)) / unconditional.spread(column(t))
        return c**scale * u ** (1 - scale) * x

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return scale * conditional.velocity(x, t) + (1 - scale) * unconditional.velocity(x, t)

    def network(x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        same = column(t) == column(s)
        gap = torch.where(same, torch.ones_like(column(t)), column(t - s))
        average = torch.where(same, guided(x, t), (x - solution(x, t, s)) / gap)
        if labels is None:
            return unconditional.network(x, t, s, None)
        null = column(labels) == NULL_LABEL
        return torch.where(null, unconditional.network(x, t, s, None), average)

    labels = torch.zeros(len(t), dtype=torch.int64)
    assert_close(solution(x, t, s), runge_kutta(guided, x, t, s), rtol=1e-7, atol=1e-9)
    for mix in (1.0, 0.25):
        objective = constant_ratio(0.001, guidance=Guidance(scale, mix, 0.1, decay_from=1.0))
        batch, draws = rows_along(x, t, s, conditional.velocity(x, t))
        kept = torch.zeros(len(t), dtype=torch.bool)
        pair = Draws(draws.noise, t, s, kept, 0)
        loss = objective.loss(network, Batch(batch.x0, labels), pair, 0, 1)
        assert loss.terms["consistency_mse"] < 1e-5
        single = Draws(draws.noise, t, t, kept, len(t))
        loss = objective.loss(network, Batch(batch.x0, labels), single, 0, 1)
        assert loss.terms["velocity_mse"] < 1e-25
        meanflow = MeanFlow(guidance=VelocityGuidance(omega=mix * scale, kappa=1 - mix))
        loss = meanflow.loss(network, Batch(batch.x0, labels), pair, 0, 1)
        assert loss.terms["average_mse"] < 1e-18
    improved = ImprovedMeanFlow(guidance=IntervalGuidance(scale))
    assert improved.loss(network, Batch(batch.x0, labels), pair, 0, 1).terms["average_mse"] < 1e-18


@given(scale=st.floats(1.5, 6), mix=st.floats(0.1, 1), decay_from=st.floats(0.1, 1))
def test_dropped_rows_do_not_know_of_guidance(scale: float, mix: float, decay_from: float) -> None:
    data, (x, t, s) = Gaussian(), grid_points(8)
    labels, dropped = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool)
    batch = Batch(x, labels)
    draws = Draws(torch.ones_like(x), t, torch.cat([t[:4], s[4:]]), dropped, 4)
    guided = SoFlow(guidance=Guidance(scale, mix, 0.1, decay_from))
    free = SoFlow(guidance=UNGUIDED)
    expected = free.loss(data.network, Batch(x), draws, 3, 10)
    found = guided.loss(data.network, batch, draws, 3, 10)
    assert torch.equal(found.loss, expected.loss)
    window = VelocityGuidance(omega=mix * scale, kappa=1 - mix, end=decay_from)
    meanflow = MeanFlow(guidance=window).loss(data.network, batch, draws, 3, 10)
    assert torch.equal(meanflow.loss, MeanFlow().loss(data.network, Batch(x), draws, 3, 10).loss)
    improved = ImprovedMeanFlow(guidance=IntervalGuidance(scale, end=decay_from))
    found = improved.loss(data.network, batch, draws, 3, 10).loss
    assert torch.equal(found, ImprovedMeanFlow().loss(data.network, Batch(x), draws, 3, 10).loss)
