"""Paths and parameterizations: end points, derivatives, boundary."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from soflow_core.parameterization import PARAMETERIZATIONS
from soflow_core.paths import PATHS

times = st.floats(0, 1, width=32)


def derivative(function: Callable[[Tensor], Tensor], t: float) -> float:
    point = torch.tensor([t], dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(function(point).sum(), point)[0].item()


@pytest.mark.parametrize("name", PATHS)
def test_a_path_starts_at_data_and_ends_at_noise(name: str) -> None:
    x0, x1 = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    path = PATHS.named(name)
    assert_close(path(torch.zeros(3, dtype=torch.float64)).state(x0, x1), x0, rtol=0, atol=1e-15)
    assert_close(path(torch.ones(3, dtype=torch.float64)).state(x0, x1), x1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", PATHS)
@given(t=times)
def test_the_velocity_is_the_derivative_of_the_state(name: str, t: float) -> None:
    path = PATHS.named(name)
    point = path(torch.tensor([t], dtype=torch.float64))
    assert point.d_alpha.item() == pytest.approx(
        derivative(lambda u: path(u).alpha, t) if name != "linear" else -1
    )
    assert point.d_beta.item() == pytest.approx(derivative(lambda u: path(u).beta, t), abs=1e-12)
    x0, x1 = torch.tensor([[[[3.0]]]], dtype=torch.float64), torch.tensor([[[[-2.0]]]], dtype=torch.float64)
    expected = 3 * point.d_alpha.item() - 2 * point.d_beta.item()
    assert point.velocity(x0, x1).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@given(t=times)
def test_the_solution_at_its_own_time_is_its_argument(name: str, t: float) -> None:
    time = torch.tensor([t], dtype=torch.float64)
    x, prediction = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(PARAMETERIZATIONS.named(name)(time, time).solution(x, prediction), x)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@given(t=times, s=times)
def test_coefficients_carry_their_derivatives_in_s(name: str, t: float, s: float) -> None:
    make = PARAMETERIZATIONS.named(name)
    time = torch.tensor([t], dtype=torch.float64)
    here = make(time, torch.tensor([s], dtype=torch.float64))
    a_s = derivative(lambda u: make(time, u).a + 0 * u, s)
    b_s = derivative(lambda u: make(time, u).b, s)
    assert (here.da_ds.item(), here.db_ds.item()) == pytest.approx((a_s, b_s), abs=1e-12)
    if s < t:
        assert here.b.item() < 0


@pytest.mark.parametrize(("name", "factor"), [("euler", 1.0), ("trigonometric", math.pi / 2)])
def test_the_velocity_of_a_network_is_its_output_times_a_constant(name: str, factor: float) -> None:
    t = torch.rand(5, dtype=torch.float64)
    x, prediction = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    assert_close(PARAMETERIZATIONS.named(name)(t, t).velocity(x, prediction), factor * prediction)
