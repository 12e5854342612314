"""The contracts of a path and of a parameterization, for every registered one or those of `--path` and `--parameterization`."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.parameterization import PARAMETERIZATIONS, Coefficients, Parameterization
from soflow_core.paths import PATHS, Path, PathPoint

STEP = 1e-4
"""Of difference quotients, in float64."""
TIMES = torch.linspace(0, 1, 101, dtype=torch.float64)
INSIDE = TIMES[1:-1]
T, S = (each.flatten() for each in torch.meshgrid(INSIDE[::7], INSIDE[::7], indexing="ij"))


def quotient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The central difference quotient of a function at each time."""
    return (function(at + STEP) - function(at - STEP)) / (2 * STEP)


def drawn(rows: int = 5) -> tuple[Tensor, Tensor]:
    """Two batches of images in float64."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, rows, 2, 3, 3, generator=generator, dtype=torch.float64)
    return one, other


@pytest.fixture
def path(path_class: type[Path]) -> Path:
    return path_class()


@pytest.fixture
def make(parameterization_class: type[Parameterization]) -> Parameterization:
    return parameterization_class()


def test_a_path_is_a_value_that_its_name_makes(path: Path) -> None:
    assert PATHS.named(path.name) == path == pickle.loads(pickle.dumps(path))
    assert hash(path) == hash(type(path)())


def test_a_path_goes_from_data_to_noise(path: Path) -> None:
    ends = path(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert_close(ends.alpha, ends.alpha.new_tensor([1.0, 0.0]), rtol=0, atol=1e-6)
    assert_close(ends.beta, ends.beta.new_tensor([0.0, 1.0]), rtol=0, atol=1e-6)
    between = path(TIMES)
    assert (between.alpha.diff() <= 1e-12).all(), "alpha falls"
    assert (between.beta.diff() >= -1e-12).all(), "beta rises"
    assert all(value.isfinite().all() for value in vars(between).values()), "also its derivatives at the ends"


def test_the_derivatives_of_a_path_are_those_of_its_coefficients(path: Path) -> None:
    point = path(INSIDE)
    assert_close(point.d_alpha, quotient(lambda t: path(t).alpha, INSIDE), rtol=1e-4, atol=1e-5)
    assert_close(point.d_beta, quotient(lambda t: path(t).beta, INSIDE), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_path_is_a_function_of_each_time_alone(path: Path, dtype: torch.dtype) -> None:
    times, before = TIMES.to(dtype), torch.get_rng_state()
    whole, part = path(times), path(times[3:5])
    assert torch.equal(before, torch.get_rng_state())
    for name, value in vars(whole).items():
        assert (value.shape, value.dtype) == (times.shape, dtype), name
        assert_close(vars(part)[name], value[3:5])


def test_a_state_is_data_and_noise_in_the_shares_of_the_path(path: Path) -> None:
    x0, x1 = drawn(len(INSIDE))
    point: PathPoint = path(INSIDE)
    moved = (path(INSIDE + STEP).state(x0, x1) - path(INSIDE - STEP).state(x0, x1)) / (2 * STEP)
    assert_close(point.velocity(x0, x1), moved, rtol=1e-4, atol=1e-4)


def test_a_parameterization_is_a_value_that_its_name_makes(make: Parameterization) -> None:
    assert PARAMETERIZATIONS.named(make.name) == make == pickle.loads(pickle.dumps(make))


def test_the_solution_at_its_own_time_is_its_argument(make: Parameterization) -> None:
    x, prediction = drawn()
    assert_close(make(TIMES[:5], TIMES[:5]).solution(x, prediction), x, rtol=0, atol=1e-9)


def test_the_derivatives_of_a_parameterization_are_those_of_its_coefficients(make: Parameterization) -> None:
    here: Coefficients = make(T, S)
    assert_close(here.da_ds, quotient(lambda s: make(T, s).a + 0 * s, S), rtol=1e-4, atol=1e-5)
    assert_close(here.db_ds, quotient(lambda s: make(T, s).b + 0 * s, S), rtol=1e-4, atol=1e-5)


def test_output_and_velocity_determine_each_other(make: Parameterization) -> None:
    x, velocity = drawn()
    own = make(TIMES[:5], TIMES[:5])
    assert (own.db_ds > 0).all()
    output = (velocity - own.da_ds.reshape(-1, 1, 1, 1) * x) / own.db_ds.reshape(-1, 1, 1, 1)
    assert_close(own.velocity(x, output), velocity)


def test_output_and_solution_determine_each_other(make: Parameterization) -> None:
    later = T > S
    assert (make(T, S).b[later] < 0).all(), "the network is asked for a step back in time"
    x, solution = drawn()
    here = make(TIMES[90:95], TIMES[10:15])
    output = (solution - here.a.reshape(-1, 1, 1, 1) * x) / here.b.reshape(-1, 1, 1, 1)
    assert_close(here.solution(x, output), solution)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parameterization_is_a_function_of_each_row_alone(
    make: Parameterization, dtype: torch.dtype
) -> None:
    t, s = T.to(dtype), S.to(dtype)
    whole, part = make(t, s), make(t[3:5], s[3:5])
    for name, value in vars(whole).items():
        assert (value.shape, value.dtype) == (t.shape, dtype), name
        assert_close(vars(part)[name], value[3:5])
