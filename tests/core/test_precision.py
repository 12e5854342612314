"""In which precision each pass of each method runs, under each policy."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from soflow_core.guidance import IntervalGuidance, VelocityGuidance
from soflow_core.objectives import (
    OBJECTIVES,
    AlphaFlow,
    ContinuousConsistency,
    Diffusion,
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
from soflow_core.passes import PassPolicy, Precision
from soflow_six_calls import six_call_loss
from tests.support.random_networks import random_inputs, random_network

MATCHED = VelocityGuidance(omega=0.75, kappa=0.75, end=0.8)
TOTAL = 100


class Watched:
    """A network that notes of each pass whether it is a JVP, whether it runs under autocast, and in what it ends."""

    def __init__(self) -> None:
        self.network = random_network(torch.float32)
        self.seen: list[tuple[bool, bool, torch.dtype]] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        result = self.network(x, t, s, labels)
        derivative = forward_ad.unpack_dual(t).tangent is not None
        self.seen.append((derivative, torch.is_autocast_enabled("cpu"), result.dtype))
        return result


def name_of(derivative: bool, autocast: bool, dtype: torch.dtype) -> str:
    """`bfloat16`, `float32`, or `jvp` for a derivative, which is in float32."""
    assert dtype == (torch.bfloat16 if autocast else torch.float32)
    assert not (derivative and autocast)
    return "jvp" if derivative else str(dtype).removeprefix("torch.")


def passes(objective: Objective, precision: Precision, step: int) -> list[str]:
    """What each pass of a step is."""
    watched = Watched()
    batch, draws = random_inputs(objective, size=16, dtype=torch.float32)
    policy = PassPolicy(precision, skip_unused=False, teacher=watched)
    loss = objective.loss(watched, batch, draws, step, TOTAL, policy)
    assert loss.loss.dtype == torch.float32
    return [name_of(*note) for note in watched.seen]


TOLERANT, EXACT, JVP = "bfloat16", "float32", "jvp"
UNDER_MIXED = [
    # Guidance, prediction of the velocity rows, the consistency pair.
    (SoFlow(), 0, [TOLERANT, TOLERANT, EXACT, EXACT]),
    (FlowMatching(), 0, [TOLERANT]),
    (Diffusion(), 0, [TOLERANT]),
    (ImprovedConsistency(), 0, [EXACT, EXACT]),
    (EasyConsistency(), TOTAL // 2, [EXACT, EXACT]),
    (ContinuousConsistency(), 0, [TOLERANT, JVP]),
    # Prediction, guidance, derivative.
    (MeanFlow(guidance=MATCHED), 0, [TOLERANT, TOLERANT, JVP]),
    # Prediction, guidance, the two passes of the quotient as one.
    (MeanFlow(guidance=MATCHED, derivative="finite_difference"), 1, [TOLERANT, TOLERANT, EXACT]),
    # Prediction, own velocity with or without guidance, derivative.
    (ImprovedMeanFlow(), 0, [TOLERANT, TOLERANT, JVP]),
    (ImprovedMeanFlow(guidance=IntervalGuidance(3.0)), 1, [TOLERANT, TOLERANT, JVP]),
    (ExplicitShortcut(), 0, [TOLERANT, TOLERANT, JVP]),
    # Prediction, guidance, the later point of the quotient or, where alpha is 0, the derivative.
    (AlphaFlow(), TOTAL // 2, [EXACT, TOLERANT, EXACT]),
    (AlphaFlow(), TOTAL, [EXACT, TOLERANT, JVP]),
    # Two half steps of the teacher, each with and without label, prediction.
    (Shortcut(bootstrap_share=0.5), 0, [TOLERANT] * 5),
]


each_method = pytest.mark.parametrize(
    ("objective", "step", "expected"), UNDER_MIXED, ids=[f"{o.method}-{step}" for o, step, _ in UNDER_MIXED]
)


@pytest.mark.parametrize("objective", [kind() for kind in OBJECTIVES.values()], ids=lambda o: o.method)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_method_runs_its_passes_as_a_policy_says(objective: Objective, precision: Precision) -> None:
    found = passes(objective, precision, 0)
    assert found
    assert set(found) <= {precision, JVP}


@each_method
def test_mixed_lowers_the_precision_of_passes_outside_quotients(
    objective: Objective, step: int, expected: list[str]
) -> None:
    assert passes(objective, "mixed", step) == expected


@each_method
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_other_policies_run_every_pass_alike_but_for_derivatives(
    objective: Objective, step: int, expected: list[str], precision: Precision
) -> None:
    found = passes(objective, precision, step)
    assert set(found) - {JVP} == {precision}
    assert found.count(JVP) == expected.count(JVP)


def test_without_guidance_soflow_has_no_pass_for_it() -> None:
    unguided = replace(SoFlow(), guidance=replace(SoFlow().guidance, scale=1))
    assert passes(unguided, "mixed", 0) == [TOLERANT, EXACT, EXACT]


def test_soflow_in_six_calls_gives_each_the_precision_of_its_kind() -> None:
    """Two of the Flow Matching branch; guidance twice and the pair of the consistency branch."""
    watched, objective = Watched(), SoFlow()
    six_call_loss(
        objective, watched, *random_inputs(objective, dtype=torch.float32), 0, TOTAL, PassPolicy("mixed")
    )
    assert [name_of(*note) for note in watched.seen] == [TOLERANT] * 4 + [EXACT] * 2


def test_the_condition_is_computed_in_float32_also_under_autocast() -> None:
    network = random_network(torch.float32)
    t, s, labels = torch.linspace(0.5, 0.51, 6), torch.linspace(0.1, 0.2, 6), torch.arange(6) % 3
    with torch.no_grad():
        plain = network.condition(t, s, labels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(network.condition(t, s, labels), plain)
