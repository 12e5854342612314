"""Guidance: decay, guided and mixed velocity, dropped labels."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from soflow_core.guidance import (
    Guidance,
    VelocityGuidance,
    decay,
    draw_dropped,
    drop_labels,
    guide_prediction,
    guided_velocity,
    mix_velocity,
)
from soflow_core.networks import NULL_LABEL
from soflow_core.random_source import GeneratorSource

V_C, V_U, V_P = torch.randn(3, 6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ONE = torch.ones(6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (0.801, 0.993),
        (0.805, 0.623),
        (0.81, 0.378),
        (0.82, 0.2015),
        (0.85, 0.072),
        (0.9, 0.025),
        (0.95, 0.008),
    ],
)
def test_decay_above_its_start_is_nearly_a_cut(t: float, expected: float) -> None:
    assert decay(torch.tensor([t], dtype=torch.float64), 0.8).item() == pytest.approx(expected, abs=6e-4)


@given(start=st.floats(0.05, 0.95))
def test_decay_is_one_up_to_its_start_then_falls_continuously_to_zero(start: float) -> None:
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    values = decay(t, start)
    assert (values[t <= start] == 1).all()
    assert values[-1] == 0
    assert (values.diff() <= 0).all()
    assert decay(torch.tensor([start + 1e-9], dtype=torch.float64), start) == pytest.approx(1, abs=1e-6)


def test_a_start_of_one_never_decays() -> None:
    assert (decay(torch.linspace(0, 1, 11), 1.0) == 1).all()


def test_without_strength_the_guided_velocity_is_the_sample_velocity() -> None:
    assert torch.equal(guided_velocity(V_C, V_U, 0 * ONE), V_C)


@given(scale=st.floats(1, 8))
def test_full_strength_extrapolates_from_the_unconditional_velocity(scale: float) -> None:
    guided = guided_velocity(V_C, V_U, (scale - 1) * ONE)
    assert_close(guided, V_U + scale * (V_C - V_U))
    assert_close(guide_prediction(V_C, V_U, scale), guided)


@given(scale=st.floats(1.1, 8), mix=st.floats(0.05, 1))
def test_scale_and_mix_are_omega_and_kappa_of_meanflow(scale: float, mix: float) -> None:
    ours = mix_velocity(guided_velocity(V_C, V_U, (scale - 1) * ONE), V_P, mix)
    theirs = VelocityGuidance(omega=mix * scale, kappa=1 - mix).velocity(V_C, V_U, V_P)
    assert_close(ours, theirs)


def test_the_mixed_in_velocity_carries_no_gradient() -> None:
    v_p = V_P.clone().requires_grad_()
    guided = V_C.clone().requires_grad_()
    mix_velocity(guided, v_p, 0.25).sum().backward()
    assert v_p.grad is None
    assert torch.equal(guided.grad, torch.full_like(guided, 0.25))


def test_dropped_labels_become_null_and_the_others_stay() -> None:
    labels = torch.tensor([3, 1, 4, 1])
    dropped = torch.tensor([False, True, True, False])
    assert drop_labels(labels, dropped).tolist() == [3, NULL_LABEL, NULL_LABEL, 1]


def test_labels_are_dropped_as_often_as_asked() -> None:
    dropped = draw_dropped(GeneratorSource(torch.Generator().manual_seed(0), 100_000), 0.1)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.005)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.5}, "give 1 for no guidance"),
        ({"mix": 0.0}, "above 0 and at most 1"),
        ({"drop": 1.0}, "probability"),
        ({"decay_from": 1.5}, "at most 1"),
    ],
)
def test_impossible_guidance_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)
