"""The contract of a sampler and of a time grid, for every registered one or those of `--sampler` and `--grid`.

Samplers are run on normally distributed data of one dimension, where the velocity, the solution and the noise are known.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.paths import linear
from soflow_core.samplers.base import NoiseSampler, Sampler, SolutionSampler, VelocitySampler
from soflow_core.samplers.diffusion import linear_alpha_bar, respaced
from soflow_core.samplers.grids import TimeGrid, uniform_times

MEAN, STD = 0.7, 0.5
"""Of the data; the latents of the path at time t have mean (1 - t) MEAN and variance (1 - t)^2 STD^2 + t^2."""
ALPHA_BAR = linear_alpha_bar(1000, 1e-4, 2e-2)
MANY, FEW = 200, 25
COUNTED = (1, 2, 3, 8)
"""Numbers of steps whose evaluations are counted."""


def spread(t: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1): standard deviation of the path."""
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt().reshape(-1, 1, 1, 1)


def exact_velocity(x: Tensor, t: Tensor) -> Tensor:
    """d/dt of the state that keeps its quantile."""
    at = t.reshape(-1, 1, 1, 1)
    growth = (at - (1 - at) * STD**2) / spread(t) ** 2
    return -MEAN + growth * (x - (1 - at) * MEAN)


def exact_solution(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The state at s with the quantile that x has at t."""
    now, then = t.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
    return (1 - then) * MEAN + spread(s) / spread(t) * (x - (1 - now) * MEAN)


def exact_noise(x: Tensor, number: Tensor) -> Tensor:
    """The noise that is expected at a step of the chain."""
    here = ALPHA_BAR[number.long()].reshape(-1, 1, 1, 1)
    return (1 - here).sqrt() * (x - here.sqrt() * MEAN) / (here * STD**2 + 1 - here)


@dataclass
class Run:
    """A sampler with its exact function, which counts its rows."""

    sampler: Sampler
    rows: int = 0

    def __call__(self, noise: Tensor, steps: int, renoise: Sequence[Tensor] = ()) -> Tensor:
        sampler = self.sampler
        if isinstance(sampler, VelocitySampler):
            return sampler.sample(self._counted(exact_velocity), noise, uniform_times(steps))
        if isinstance(sampler, SolutionSampler):
            return sampler.sample(self._counted(exact_solution), noise, uniform_times(steps), renoise, linear)
        assert isinstance(sampler, NoiseSampler), "it is of no kind of sampler that a method knows"
        numbers = respaced(len(ALPHA_BAR), steps)
        return sampler.sample(self._counted(exact_noise), noise, ALPHA_BAR, numbers, renoise)

    def _counted(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(x: Tensor, *times: Tensor) -> Tensor:
            assert all(time.shape == (len(x),) for time in times), "a time for every row"
            self.rows += len(x)
            return function(x, *times)

        return counted


@pytest.fixture
def run(sampler_class: type[Sampler]) -> Run:
    return Run(sampler_class())


def noises(rows: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, rows, 1, 1, 1, generator=generator, dtype=torch.float64))


def test_it_is_a_value(sampler_class: type[Sampler]) -> None:
    assert pickle.loads(pickle.dumps(sampler_class())) == sampler_class()


@pytest.mark.parametrize("steps", COUNTED)
def test_it_evaluates_as_often_as_it_says(run: Run, steps: int) -> None:
    noise, *renoise = noises(1, steps)
    run(noise, steps, renoise)
    assert run.sampler.evaluations(steps) == run.rows >= steps


def test_more_steps_cost_more(run: Run) -> None:
    costs = [run.sampler.evaluations(steps) for steps in range(1, 20)]
    assert costs == sorted(set(costs))


def test_it_draws_nothing_and_keeps_no_graph(run: Run) -> None:
    noise, *renoise = noises(3, 4)
    before, given = torch.get_rng_state(), noise.clone()
    first = run(noise, 4, renoise)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(noise, given), "the noise is not changed in place"
    assert torch.equal(first, run(noise, 4, renoise))
    assert not run(noise.requires_grad_(), 4, renoise).requires_grad


def test_rows_are_independent(run: Run) -> None:
    noise, *renoise = noises(4, 3)
    together = run(noise, 3, renoise)
    assert together.shape == noise.shape
    assert together.isfinite().all()
    assert_close(run(noise[1:3], 3, [each[1:3] for each in renoise]), together[1:3])


def test_samples_of_the_exact_function_have_the_distribution_of_the_data(run: Run) -> None:
    """The sampler is affine here: its mean is its result without noise, its variance the sum of the squared responses."""

    def deviation(steps: int) -> float:
        rows = torch.cat([torch.zeros(1, steps), torch.eye(steps)]).double()
        first, *others = rows.T.reshape(steps, -1, 1, 1, 1)
        mean, *responses = run(first, steps, others).flatten().tolist()
        std = math.sqrt(sum((response - mean) ** 2 for response in responses))
        return abs(mean - MEAN) + abs(std - STD)

    assert deviation(MANY) < 0.05
    assert deviation(MANY) <= deviation(FEW) + 1e-6


@pytest.mark.parametrize("steps", [1, 2, 5, 64])
def test_the_times_of_a_grid_fall_from_noise_to_data(grid_class: type[TimeGrid], steps: int) -> None:
    times = grid_class().times(steps)
    assert (len(times), times[0], times[-1]) == (steps + 1, 1.0, 0.0)
    assert times == sorted(set(times), reverse=True)


def test_a_grid_has_numbers_for_settings(grid_class: type[TimeGrid]) -> None:
    values: dict[str, Any] = vars(grid_class())
    assert all(isinstance(value, float) for name, value in values.items() if name != "name"), (
        "a value is given behind its name as text"
    )
    with pytest.raises(ValueError, match="at least 1"):
        grid_class().times(0)
