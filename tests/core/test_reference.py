"""Agreement with the official SoFlow implementation to float32 rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from soflow_core.guidance import decay
from soflow_core.objectives import Draws
from soflow_core.passes import PassPolicy
from soflow_core.times import RatioSchedule, middle_time
from tests.support.reference_cases import CASES, SCHEDULES, Case, load_case

BRANCHES = ["velocity", "consistency"]
# Of a gradient's largest element. The consistency branch divides the float32 rounding of f_t - f_l by t - l, which moves
# the official values themselves by up to 9e-5 of it from those of float64.
ABSOLUTE = {"velocity": 1e-5, "consistency": 1e-4}


@pytest.fixture(params=CASES)
def case(
    request: pytest.FixtureRequest, reference_settings: dict[str, Any], reference_tensors: dict[str, Tensor]
) -> Case:
    return load_case(request.param, reference_settings, reference_tensors)


def branch_draws(case: Case, branch: str) -> Draws:
    return case.velocity_draws() if branch == "velocity" else case.consistency_draws()


@pytest.mark.parametrize("skip_unused", [True, False], ids=["skipping", "whole"])
@pytest.mark.parametrize("branch", BRANCHES)
def test_loss_mse_weight_and_every_gradient(case: Case, branch: str, skip_unused: bool) -> None:
    step, total = case.settings["k"], case.settings["K"]
    policy = PassPolicy(skip_unused=skip_unused)
    draws = branch_draws(case, branch)
    result = case.objective.loss(case.network, case.batch, draws, step, total, policy)
    result.loss.backward()
    expected = case.settings[branch]
    assert result.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert result.terms[f"{branch}_mse"].item() == pytest.approx(expected["mse"], rel=1e-5)
    assert result.terms[f"{branch}_weight"].item() == pytest.approx(expected["weight"], rel=1e-5)
    gradients = case.gradients(branch)
    trained = {name: p.grad for name, p in case.network.named_parameters() if p.requires_grad}
    assert set(trained) - set(gradients) == set()
    for name, gradient in gradients.items():
        atol = ABSOLUTE[branch] * gradient.abs().max().item()
        assert_close(trained[name], gradient, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_both_branches_in_one_step_are_the_weighted_sum_of_each(case: Case) -> None:
    """Rows of both branches together, as in training: the fused step against the reference's rows."""
    step, total = case.settings["k"], case.settings["K"]
    velocity, consistency = case.velocity_draws(), case.consistency_draws()
    both = type(velocity)(
        noise=torch.cat([velocity.noise, consistency.noise]),
        t=torch.cat([velocity.t, consistency.t]),
        s=torch.cat([velocity.s, consistency.s]),
        dropped=None if velocity.dropped is None else torch.cat([velocity.dropped, velocity.dropped]),
        velocity_rows=len(velocity.t),
    )
    x0, labels = case.batch.x0, case.labels
    batch = type(case.batch)(torch.cat([x0, x0]), None if labels is None else torch.cat([labels, labels]))
    result = case.objective.loss(case.network, batch, both, step, total)
    result.loss.backward()
    expected = (case.settings["velocity"]["loss"] + case.settings["consistency"]["loss"]) / 2
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
    parts = [case.gradients(branch) for branch in BRANCHES]
    for name, parameter in case.network.named_parameters():
        if parameter.requires_grad:
            gradient = (parts[0][name] + parts[1][name]) / 2
            atol = ABSOLUTE["consistency"] * gradient.abs().max().item()
            assert_close(parameter.grad, gradient, rtol=1e-4, atol=atol)


def test_middle_times_of_the_batch(case: Case) -> None:
    ratio = case.objective.schedule.ratio(case.settings["k"], case.settings["K"])
    middle = middle_time(case.tensors["t"], case.tensors["s"], ratio)
    assert_close(middle, case.tensors["l"], rtol=0, atol=1.2e-7)


def test_solution_and_velocity(case: Case) -> None:
    tensors = case.tensors
    with torch.no_grad():
        f = case.objective.solution(case.network, tensors["x1"], tensors["t"], tensors["s"], case.labels)
        v = case.objective.velocity(case.network, tensors["x1"], tensors["t_velocity"], case.labels)
    assert_close(f, tensors["f_t_s"], rtol=1e-5, atol=1e-5)
    assert_close(v, tensors["v_t"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_samples(case: Case, steps: int) -> None:
    with torch.no_grad():
        samples = case.objective.sample(
            case.network, case.tensors["x1"], case.labels, steps, list(case.tensors["renoise"])
        )
    assert_close(samples, case.tensors[f"sample_nfe{steps}"], rtol=1e-5, atol=2e-5)


def test_guidance_decay(case: Case) -> None:
    t = torch.linspace(0, 1, 21)
    assert_close(decay(t, case.settings["decay"]), case.tensors["cfg_decay"], rtol=1e-5, atol=1e-6)


def test_middle_time_schedules(reference_settings: dict[str, Any]) -> None:
    for row in reference_settings["middle_time"]:
        schedule = RatioSchedule(SCHEDULES[row["schedule"]], row["r_init"], row["r_end"])
        middle = middle_time(
            torch.tensor([row["t"]]), torch.tensor([row["s"]]), schedule.ratio(row["k"], row["K"])
        )
        assert middle.item() == pytest.approx(row["l"], abs=1.2e-7), row
