"""Samplers with exact functions: distributions, orders of error and end points; and the noise of a sample."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from soflow_core.nfe import sampling_evaluations, steps_for
from soflow_core.objectives import OBJECTIVES, Diffusion, FlowMatching, MeanFlow, Objective, Shortcut, SoFlow
from soflow_core.paths import linear
from soflow_core.registration import register
from soflow_core.samplers.base import SAMPLERS, NoiseSampler, Velocity, VelocitySampler
from soflow_core.samplers.diffusion import Ddim, Ddpm, linear_alpha_bar, numbers_at, respaced
from soflow_core.samplers.grids import time_grid, uniform_times
from soflow_core.samplers.noise import sample_labels, sample_noise
from soflow_core.samplers.ode import Euler, Heun
from soflow_core.samplers.solution import ConsistencySampler, StepSampler
from tests.support.gaussian import Gaussian
from tests.support.random_networks import SHAPE, random_network

DATA = Gaussian(0.7, 0.5)
X = torch.linspace(-2, 3, 101, dtype=torch.float64).reshape(-1, 1, 1, 1)


def affine_response(sampler: Callable[[Tensor, Sequence[Tensor]], Tensor], steps: int) -> tuple[float, float]:
    """Mean and variance of an affine sampler's output for independent normal noises, of which row 0 has none and
    row i the i-th alone.
    """
    rows = torch.cat([torch.zeros(1, steps), torch.eye(steps)]).double()
    first, *others = rows.T.reshape(steps, -1, 1, 1, 1)
    mean, *responses = sampler(first, others).flatten().tolist()
    return mean, sum((response - mean) ** 2 for response in responses)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_renoising_with_the_exact_solution_keeps_the_distribution(steps: int) -> None:
    def sampler(noise: Tensor, renoise: Sequence[Tensor]) -> Tensor:
        return ConsistencySampler().sample(DATA.solution, noise, uniform_times(steps), renoise, linear)

    assert affine_response(sampler, steps) == pytest.approx((0.7, 0.25), abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_steps_of_the_exact_solution_end_where_one_step_does(steps: int) -> None:
    found = StepSampler().sample(DATA.solution, X, uniform_times(steps), [], linear)
    assert_close(found, 0.7 + 0.5 * X)


@pytest.mark.parametrize("objective", [SoFlow(), MeanFlow(), Shortcut()], ids=lambda o: o.method)
def test_one_step_objectives_sample_exactly_with_the_exact_field(objective: Objective) -> None:
    assert_close(objective.sample(DATA.network, X, None, 1), 0.7 + 0.5 * X)


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (Heun(), 2)])
def test_a_solver_has_its_order(solver: VelocitySampler, order: int) -> None:
    exact = 0.7 + 0.5 * X
    errors = [
        (solver.sample(DATA.velocity, X, uniform_times(n)) - exact).abs().max().item() for n in (32, 64, 128)
    ]
    for coarse, fine in ((errors[0], errors[1]), (errors[1], errors[2])):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


def test_solvers_evaluate_as_often_as_they_say() -> None:
    calls = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t[0].item())
        return torch.zeros_like(x)

    Euler().sample(velocity, X, uniform_times(4))
    assert calls == [1, 0.75, 0.5, 0.25]
    calls.clear()
    Heun().sample(velocity, X, uniform_times(2))
    assert calls == [1, 0.5, 0.5, 0]


@pytest.mark.parametrize("objective", [kind() for kind in OBJECTIVES.values()], ids=lambda o: o.method)
def test_sampling_keeps_no_graph_of_its_passes(objective: Objective) -> None:
    network = random_network(torch.float32)
    noise = [torch.randn(2, *SHAPE) for _ in range(4)]
    assert not objective.sample(network, noise[0], None, 4, noise[1:]).requires_grad


def along(
    sampler: NoiseSampler,
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    alpha_bar: Tensor,
    steps: int,
) -> Callable[[Sequence[Tensor]], Tensor]:
    """The sampler in evenly spaced steps, as a function of the noise that it adds."""
    numbers = respaced(len(alpha_bar), steps)
    return lambda renoise: sampler.sample(predict, x, alpha_bar, numbers, renoise)


def exact_noise(alpha_bar: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """eps = sqrt(1 - abar) (x - sqrt(abar) mean) / (abar std^2 + 1 - abar)."""

    def predict(x: Tensor, number: Tensor) -> Tensor:
        here = alpha_bar[number.long()].reshape(-1, 1, 1, 1)
        return (1 - here).sqrt() * (x - here.sqrt() * DATA.mean) / (here * DATA.std**2 + 1 - here)

    return predict


def test_ddim_ends_at_the_exact_end_point_to_first_order() -> None:
    alpha_bar = linear_alpha_bar(1000, 1e-4, 2e-2)
    last = alpha_bar[-1]
    scale = DATA.std / (last * DATA.std**2 + 1 - last).sqrt()
    exact = DATA.mean + scale * (X - last.sqrt() * DATA.mean)
    errors = {
        n: (along(Ddim(), exact_noise(alpha_bar), X, alpha_bar, n)([]) - exact).abs().max().item()
        for n in (10, 50, 250, 1000)
    }
    assert errors[1000] < 6e-3
    assert errors[250] / errors[1000] == pytest.approx(4, rel=0.1)
    assert errors[50] / errors[250] == pytest.approx(5, rel=0.1)
    assert errors[10] < 0.5


def test_ddpm_with_exact_noise_gives_the_data_distribution() -> None:
    alpha_bar = linear_alpha_bar(1000, 1e-4, 2e-2)

    def sampler(noise: Tensor, renoise: Sequence[Tensor]) -> Tensor:
        return along(Ddpm(), exact_noise(alpha_bar), noise, alpha_bar, 250)(renoise)

    mean, variance = affine_response(sampler, 250)
    assert mean == pytest.approx(0.7, abs=0.01)
    assert variance == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("steps", [10, 50])
def test_ddpm_keeps_the_forward_marginals_of_a_single_datum_at_any_spacing(steps: int) -> None:
    """With x0 known the posterior q(x' | x, x0) makes N(sqrt(abar') x0, 1 - abar') of N(sqrt(abar) x0, 1 - abar)."""
    alpha_bar, datum = linear_alpha_bar(1000, 1e-4, 2e-2), 0.7
    numbers = respaced(1000, steps)
    first = float(alpha_bar[numbers[0]])

    def state(number: int, noise: Tensor, renoise: Sequence[Tensor]) -> Tensor:
        """The chain's state at this step number."""
        seen = {}

        def predict(x: Tensor, numbers: Tensor) -> Tensor:
            seen[int(numbers[0])] = x
            here = alpha_bar[numbers.long()].reshape(-1, 1, 1, 1)
            return (x - here.sqrt() * datum) / (1 - here).sqrt()

        start = first**0.5 * datum + (1 - first) ** 0.5 * noise
        along(Ddpm(), predict, start, alpha_bar, steps)(renoise)
        return seen[number]

    for number in (numbers[1], numbers[steps // 2], numbers[-1]):
        here = float(alpha_bar[number])
        found = affine_response(partial(state, number), steps)
        assert found == pytest.approx((here**0.5 * datum, 1 - here), rel=1e-6)


def test_one_step_from_pure_noise_to_data_leaves_no_noise_to_add() -> None:
    alpha_bar = linear_alpha_bar(1000, 1e-4, 2e-2)
    once, other = (along(kind, exact_noise(alpha_bar), X, alpha_bar, 1)([]) for kind in (Ddpm(), Ddim()))
    assert_close(once, other)


@given(total=st.integers(2, 1000), data=st.data())
def test_respaced_steps_fall_from_the_last_to_the_first_without_repeats(
    total: int, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(2, total))
    numbers = respaced(total, steps)
    assert (numbers[0], numbers[-1], len(set(numbers))) == (total - 1, 0, steps)
    assert numbers == sorted(numbers, reverse=True)


def test_guidance_at_sampling_acts_in_every_channel() -> None:
    def network(x: Tensor, _t: Tensor, _s: Tensor, labels: Tensor | None) -> Tensor:
        return torch.where((labels == -1).reshape(-1, 1, 1, 1), 1.0, 3.0) * torch.ones_like(x)

    x = torch.zeros(2, 4, 1, 1)
    labels = torch.tensor([0, 1])
    found = FlowMatching(sampling_scale=2.0).sample(network, x, labels, 4)
    assert torch.equal(found, torch.full_like(x, -5.0))
    assert torch.equal(FlowMatching().sample(network, x, labels, 4), torch.full_like(x, -3.0))


def test_too_few_noises_or_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="3 steps need 2 noises in renoise; 1 were given"):
        SoFlow().sample(DATA.network, X, None, 3, [X])
    for objective in (SoFlow(), MeanFlow(), FlowMatching()):
        with pytest.raises(ValueError, match="at least 1"):
            objective.sample(DATA.network, X, None, 0)
    for steps in (0, 3):
        with pytest.raises(ValueError, match=f"{steps} steps are not on the grid of 128"):
            Shortcut().sample(DATA.network, X, None, steps)
    with pytest.raises(ValueError, match="give 1 to 1000"):
        Diffusion().sample(lambda x, *_: x, X, None, 1001)


# Time grids, and the evaluations of a number of steps


def test_grids_have_the_times_of_their_formulas() -> None:
    assert time_grid("power:2").times(4) == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16, 0])
    assert time_grid("shifted:3").times(4) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert time_grid("shifted:1").times(4) == pytest.approx(uniform_times(4))
    assert time_grid("uniform").times(3) == uniform_times(3)


@pytest.mark.parametrize("text", ["linear", "", "power:", "power:two", "power:0", "uniform:1", "shifted:nan"])
@pytest.mark.parametrize("kind", [FlowMatching, Diffusion, MeanFlow])
def test_an_unknown_grid_or_value_is_refused(kind: type[Objective], text: str) -> None:
    with pytest.raises(ValueError, match=f"sampling_grid is '{text}'"):
        kind(sampling_grid=text)  # type: ignore[call-arg]


def test_steps_end_at_the_times_of_the_grid_or_those_that_are_set() -> None:
    seen: list[float] = []

    def network(x: Tensor, t: Tensor, _s: Tensor, _labels: Tensor | None) -> Tensor:
        seen.append(t[0].item())
        return torch.zeros_like(x)

    for objective, expected in (
        (FlowMatching(sampling_grid="power"), [1, 4 / 9, 1 / 9]),
        (FlowMatching(sampling_times=(0.75, 0.25)), [1, 0.75, 0.25]),
        (FlowMatching(sampling_times=(0.5,), sampling_grid="power"), [1, 4 / 9, 1 / 9]),
        (MeanFlow(sampling_grid="power"), [1, 4 / 9, 1 / 9]),
        (Diffusion(sampling_grid="power"), [999, 444, 111]),
        (Diffusion(sampling_times=(0.5, 0.1)), [999, round(0.5 * 999), 100]),
        (Diffusion(), [999, 500, 0]),
    ):
        seen.clear()
        objective.sample(network, X.float(), None, 3)
        assert seen == pytest.approx(expected)


def test_steps_that_fall_on_one_step_number_of_a_diffusion_are_refused() -> None:
    assert numbers_at(1000, uniform_times(4)) == [999, 749, 500, 250]
    with pytest.raises(ValueError, match="3 sampling steps fall on 2 of 4 step numbers; take fewer steps"):
        Diffusion(diffusion_steps=4, sampling_times=(0.6, 0.55)).sample(lambda x, *_: x, X, None, 3)


@pytest.fixture
def last_step_euler() -> Iterator[str]:
    """Heun's method with an Euler step at the end, as in EDM: 2 N - 1 evaluations."""

    @register("last-step-euler")
    @dataclass(frozen=True)
    class LastStepEuler(VelocitySampler):
        """Second order, but for the last step."""

        def step(self, velocity: Velocity, x: Tensor, start: float, end: float) -> Tensor:
            return (Heun() if end else Euler()).step(velocity, x, start, end)

    yield "last-step-euler"
    del SAMPLERS.parts["last-step-euler"]


def test_a_number_of_evaluations_is_that_of_the_sampler_not_a_multiple_of_a_step(
    last_step_euler: str,
) -> None:
    objective = FlowMatching(sampler=last_step_euler)
    assert [sampling_evaluations(objective, steps) for steps in (1, 2, 4)] == [1, 3, 7]
    assert [steps_for(objective, evaluations) for evaluations in (1, 3, 7, 199)] == [1, 2, 4, 100]
    assert steps_for(replace(objective, sampling_scale=2.0), 6) == 2
    with pytest.raises(
        ValueError, match="4 evaluations cannot be had, for flow_matching makes 3 in 2 and 5 in 3 steps"
    ):
        steps_for(objective, 4)


def test_a_sampler_that_says_a_wrong_number_of_evaluations_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Heun, "evaluations", lambda _, steps: 3 * steps - 1)
    with pytest.raises(ValueError, match="makes 4 evaluations in 2 steps, and its sampler heun says 5"):
        steps_for(FlowMatching(sampler="heun"), 5)


# Noise of a sample


@given(
    seed=st.integers(0, 2**64 - 1),
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=6),
    draw=st.integers(0, 9),
)
def test_a_row_depends_on_seed_index_and_draw_alone(seed: int, indices: list[int], draw: int) -> None:
    together = sample_noise(seed, indices, (2, 3, 3), draw)
    for row, index in zip(together, indices, strict=True):
        assert torch.equal(sample_noise(seed, [index], (2, 3, 3), draw)[0], row)


def test_seeds_indices_and_draws_are_all_different_noise() -> None:
    rows = [
        sample_noise(seed, [index], (1, 2, 2), draw)
        for seed in (0, 1, 2**32, 2**32 + 1)
        for index in (0, 1, 2**32)
        for draw in (0, 1)
    ]
    assert len({tuple(r.flatten().tolist()) for r in rows}) == len(rows)


def test_noise_is_standard_normal_and_uncorrelated() -> None:
    noise = sample_noise(7, range(200), (1, 32, 33)).flatten(1).double()
    flat = noise.flatten()
    assert flat.mean().abs() < 0.01
    assert flat.var().item() == pytest.approx(1, abs=0.01)
    assert (flat**4).mean().item() == pytest.approx(3, abs=0.06)
    share = (flat.abs() < 1).double().mean().item()
    assert share == pytest.approx(0.6827, abs=0.003)
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean(), (noise[1:] * noise[:-1]).mean()
    assert max(abs(n) for n in neighbours) < 0.01


def test_labels_are_uniform_or_balanced() -> None:
    labels = sample_labels(3, range(100_000), 10)
    counts = torch.bincount(labels, minlength=10)
    assert ((counts - 10_000).abs() < 400).all()
    assert torch.equal(labels[5:9], sample_labels(3, range(5, 9), 10))
    assert sample_labels(3, range(8, 13), 5, balanced=True).tolist() == [3, 4, 0, 1, 2]
