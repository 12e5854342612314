"""Settings of sampling with a learned solution: the sampler, and the times at which its steps end."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.nfe import sampling_evaluations
from soflow_core.objectives import OBJECTIVES, ImprovedConsistency, Objective, Shortcut, SoFlow
from soflow_core.objectives.consistency import ConsistencyModel
from soflow_core.objectives.solution_model import FlowMapModel
from soflow_core.settings import from_dict, to_dict
from tests.support.gaussian import Gaussian
from tests.support.random_networks import SHAPE, random_network

DATA = Gaussian(0.7, 0.5)
FLOW_MAPS = [name for name, kind in OBJECTIVES.items() if issubclass(kind, FlowMapModel)]
CONSISTENCY_MODELS = [name for name, kind in OBJECTIVES.items() if issubclass(kind, ConsistencyModel)]
TIMES = {3: (0.75, 0.25), 2: (0.25,), 1: ()}


def method(name: str, **settings: Any) -> Any:
    return OBJECTIVES[name](**settings)


def calls(objective: Objective, steps: int) -> list[tuple[float, float]]:
    """t and s of each evaluation."""
    seen = []

    def network(x: Tensor, t: Tensor, s: Tensor, _labels: Tensor | None) -> Tensor:
        seen.append((t[0].item(), s[0].item()))
        return torch.zeros_like(x)

    noise = torch.zeros(1, *SHAPE)
    objective.sample(network, noise, None, steps, [noise] * (steps - 1))
    return seen


def noises(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, 3, *SHAPE, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("name", FLOW_MAPS)
def test_steps_are_those_of_the_sampler_at_the_times_that_are_set(name: str) -> None:
    times = (0.5, 0.25)
    consistency = method(name, sampler="consistency", sampling_times=times)
    assert calls(consistency, 3) == [(1, 0), (0.5, 0), (0.25, 0)]
    ode = method(name, sampler="ode", sampling_times=times)
    assert calls(ode, 3) == [(1, 0.5), (0.5, 0.25), (0.25, 0)]
    for objective in (consistency, ode):
        assert [t for t, _ in calls(objective, 2)] == [1, 0.5]
        assert sampling_evaluations(objective, 3) == 3


@pytest.mark.parametrize("name", CONSISTENCY_MODELS)
def test_consistency_models_take_times_and_have_one_sampler(name: str) -> None:
    assert calls(method(name, sampling_times=(0.45,)), 2) == [(1, 0), (pytest.approx(0.45), 0)]
    with pytest.raises(ValueError, match="has no setting sampler"):
        from_dict(OBJECTIVES[name], {"sampler": "ode"})


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", FLOW_MAPS)
def test_both_samplers_are_exact_with_the_exact_solution_at_any_times(name: str, steps: int) -> None:
    times = (0.5, 0.25)[: steps - 1] if name == "shortcut" else TIMES[steps]
    ode = method(name, sampler="ode", sampling_times=times)
    x = torch.linspace(-2, 3, 11, dtype=torch.float64).reshape(-1, 1, 1, 1)
    assert_close(ode.sample(DATA.network, x, None, steps), 0.7 + 0.5 * x)
    # Row 0 has no noise, row i the i-th noise alone: the sampler is affine, and the variance the sum of squares.
    rows = torch.cat([torch.zeros(1, steps), torch.eye(steps)]).double()
    first, *others = rows.T.reshape(steps, -1, 1, 1, 1)
    found = replace(ode, sampler="consistency").sample(DATA.network, first, None, steps, others)
    mean, *responses = found.flatten().tolist()
    assert (mean, sum((r - mean) ** 2 for r in responses)) == pytest.approx((0.7, 0.25), abs=1e-6)


def test_noise_is_added_again_on_the_path_of_the_method() -> None:
    network, labels = random_network(), torch.tensor([0, 1, 2])
    noise, again = noises(2)
    t = torch.full((3,), 0.3, dtype=torch.float64)
    for path, (alpha, beta) in {
        "linear": (0.7, 0.3),
        "trigonometric": (math.cos(0.15 * math.pi), math.sin(0.15 * math.pi)),
    }.items():
        objective = SoFlow(path=path, sampling_times=(0.3,))  # type: ignore[arg-type]
        x0 = objective.solution(network, noise, torch.ones_like(t), 0 * t, labels)
        expected = objective.solution(network, alpha * x0 + beta * again, t, 0 * t, labels)
        assert_close(objective.sample(network, noise, labels, 2, [again]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*FLOW_MAPS, *CONSISTENCY_MODELS])
def test_without_settings_a_method_is_sampled_as_in_its_own_code(name: str) -> None:
    network, labels = random_network(), torch.tensor([0, 1, 2])
    noise, *renoise = noises(4)
    plain = method(name)
    own = {"sampler": "consistency" if name == "soflow" else "ode"} if name in FLOW_MAPS else {}
    same = replace(plain, sampling_times=(0.75, 0.5, 0.25), **own)
    found = [objective.sample(network, noise, labels, 4, renoise) for objective in (plain, same)]
    assert torch.equal(*found)


def test_without_noise_to_add_the_ode_sampler_needs_none() -> None:
    network, (noise,) = random_network(), noises(1)
    assert SoFlow(sampler="ode").sample(network, noise, None, 2).shape == noise.shape
    with pytest.raises(ValueError, match="2 steps need 1 noises in renoise; 0 were given"):
        method("meanflow", sampler="consistency").sample(network, noise, None, 2)


@pytest.mark.parametrize("times", [(1.0,), (0.0,), (0.3, 0.6), (0.5, 0.5), (-0.1,), (1.5, 0.5)])
@pytest.mark.parametrize("name", ["soflow", "meanflow", "ict", "shortcut"])
def test_times_that_do_not_fall_from_1_to_0_are_refused(name: str, times: Sequence[float]) -> None:
    with pytest.raises(ValueError, match="give times between 1 and 0, each below the one before"):
        method(name, sampling_times=times)


def test_a_sampler_or_times_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SoFlow\.sampler is 'ddim'; it is one of 'consistency', 'ode'"):
        method("soflow", sampler="ddim")
    with pytest.raises(
        ValueError, match=r"sampling_times is \(nan,\); a list of finite numbers is needed, or none"
    ):
        ImprovedConsistency(sampling_times=(math.nan,))


def test_steps_that_shortcut_does_not_train_are_refused() -> None:
    shortcut = Shortcut(sampler="consistency", sampling_times=(0.25,))
    assert calls(shortcut, 2) == [(1, 0), (0.25, 0)]
    assert calls(Shortcut(sampling_times=(0.5, 0.25)), 3) == [(1, 0.5), (0.5, 0.25), (0.25, 0)]
    refused = [
        (Shortcut(sampling_times=(0.25,)), 2, "from 1 to 0.25"),
        (Shortcut(sampling_times=(0.55,)), 2, "from 1 to 0.55"),
        (Shortcut(sampling_times=(0.75, 0.25)), 3, "from 0.75 to 0.25"),
        (Shortcut(sampler="consistency"), 4, "from 0.75 to 0"),
    ]
    for objective, steps, step in refused:
        with pytest.raises(ValueError, match=f"the step {step} is not trained"):
            calls(objective, steps)


@pytest.mark.parametrize("name", FLOW_MAPS)
def test_settings_of_sampling_come_back_from_plain_values(name: str) -> None:
    objective = method(name, sampler="ode", sampling_times=(0.5,))
    values = {**to_dict(objective), "sampling_times": [0.5]}
    assert from_dict(OBJECTIVES[name], values) == objective
