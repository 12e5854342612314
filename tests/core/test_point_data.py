"""Data of a few points, whose solution function jumps where the basins of the points meet.

`test_oracle_...` check the exact functions themselves, which are part of the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.guidance import Guidance
from soflow_core.objectives import SoFlow
from soflow_core.samplers.grids import uniform_times
from soflow_core.samplers.ode import Euler
from soflow_core.times import RatioSchedule
from tests.support.gaussian import column, rows_along, runge_kutta

A = 0.8


def two_points_velocity(x: Tensor, t: Tensor) -> Tensor:
    """v of equal points at -a and a, in each coordinate: (x - a tanh(a (1 - t) x / t^2)) / t."""
    t = column(t)
    return (x - A * torch.tanh(A * (1 - t) * x / t**2)) / t


@dataclass(frozen=True)
class IsotropicMixture:
    """N(c_k, std^2 I) in four dimensions with unequal weights; the coordinates depend on each other."""

    std: float = 0.3

    @property
    def centres(self) -> Tensor:
        points = [[1.0, 0.5, -0.5, 0.0], [-0.8, 0.2, 0.9, -1.0], [0.1, -1.2, 0.0, 0.7]]
        return torch.tensor(points, dtype=torch.float64)

    @property
    def weights(self) -> Tensor:
        return torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The components' velocities, weighted by responsibilities over the whole of x (B, 1, 2, 2)."""
        flat, time = x.flatten(1)[:, None], t[:, None, None]
        z = flat - (1 - time) * self.centres
        variance = (1 - time) ** 2 * self.std**2 + time**2
        logits = self.weights.log() - z.square().sum(-1) / (2 * variance[..., 0])
        growth = (time - (1 - time) * self.std**2) / variance
        each = -self.centres + growth * z
        return (logits.softmax(1)[..., None] * each).sum(1).reshape(x.shape)

    def solution(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return runge_kutta(self.velocity, x, t, s, steps=200)

    def network(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        del labels
        gap = column(t - s)
        return (x - self.solution(x, t, s)) / gap


def points(count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, 1, 2, 2), t, s (B,), with s <= t - 0.1."""
    generator = torch.Generator().manual_seed(0)
    t = 0.3 + 0.65 * torch.rand(count, generator=generator, dtype=torch.float64)
    s = 0.1 + (t - 0.2) * torch.rand(count, generator=generator, dtype=torch.float64)
    x = torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64)
    return x, t, s


def test_oracle_velocity_of_two_points_is_the_mean_of_those_through_x() -> None:
    """v = sum_i r_i (x - x_i) / t, with r_i the posterior of point i."""
    x, t, _ = points()
    time = column(t)
    logits = torch.stack([-((x - (1 - time) * a) ** 2) / (2 * time**2) for a in (-A, A)])
    expected = (logits.softmax(0) * torch.stack([(x + A) / time, (x - A) / time])).sum(0)
    assert_close(two_points_velocity(x, t), expected)


def test_oracle_step_from_noise_lands_on_the_nearer_of_two_points() -> None:
    """f(x, 1, 0) = a sign(x), here along many small steps that shrink towards t = 0."""
    x = torch.tensor([-2.0, -0.6, -0.05, 0.05, 0.6, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    here, t = x, torch.ones(len(x), dtype=torch.float64)
    for _ in range(60):
        there = t * 0.85
        here, t = runge_kutta(two_points_velocity, here, t, there, steps=40), there
    assert_close(here, A * torch.sign(x), rtol=0, atol=1e-3)


def test_euler_steps_find_the_two_points_and_between_them_their_mean() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    found = Euler().sample(two_points_velocity, x, uniform_times(400))
    assert_close(found.flatten(), torch.tensor([-A, 0.0, A], dtype=torch.float64), rtol=0, atol=1e-2)


def test_oracle_flow_of_a_mixture_in_four_dimensions_is_a_semigroup() -> None:
    data, (x, t, s) = IsotropicMixture(), points()
    middle = s + 0.4 * (t - s)
    there = data.solution(data.solution(x, t, middle), middle, s)
    assert_close(there, data.solution(x, t, s), rtol=1e-6, atol=1e-7)


def test_oracle_mixture_has_coordinates_that_depend_on_each_other() -> None:
    data, (x, t, _) = IsotropicMixture(), points()
    moved = x.clone()
    moved[:, 0, 0, 0] += 0.5
    change = data.velocity(moved, t) - data.velocity(x, t)
    assert change[:, 0, 1, 1].abs().max() > 1e-2


def test_the_quotient_of_its_exact_solution_vanishes_with_r() -> None:
    data, (x, t, s) = IsotropicMixture(), points()
    batch, draws = rows_along(x, t, s, data.velocity(x, t))
    sizes = []
    for ratio in (0.1, 0.01):
        schedule = RatioSchedule("constant", ratio, ratio)
        objective = SoFlow(schedule=schedule, guidance=Guidance(scale=1), weight_power=0.0)
        sizes.append(objective.loss(data.network, batch, draws, 0, 1).terms["consistency_mse"].sqrt().item())
    assert sizes[1] / sizes[0] == pytest.approx(0.1, rel=0.2)
