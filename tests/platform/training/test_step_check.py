"""One step of each trial, tried with a small network before anything is started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from soflow_core.failures import InputError
from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import OBJECTIVES, FlowMatching
from soflow_pipelines.preparation.builtin import BUILTIN
from soflow_platform.errors import UserError
from soflow_platform.training.step_check import StepCheckError, check_first_steps
from tests.platform.conftest import small_experiment

DIGITS = BUILTIN["digits"]


@pytest.mark.parametrize("method", OBJECTIVES)
def test_the_step_of_a_shipped_method_passes(method: str) -> None:
    check_first_steps([(method, small_experiment(f"objective={{method: {method}}}"))], DIGITS)


def test_an_exception_names_the_trial_and_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_loss(self: Any, network: Any, batch: Any, *rest: Any) -> Any:
        del self, network, rest
        return batch.x0 + batch.x0[:, :, :-1]

    monkeypatch.setattr(FlowMatching, "loss", broken_loss)
    trials = [
        ("trial-00", small_experiment()),
        ("trial-01", small_experiment("objective={method: flow_matching}")),
    ]
    with pytest.raises(
        StepCheckError, match=r"^trial trial-01 fails in its first step: RuntimeError: The size"
    ) as caught:
        check_first_steps(trials, DIGITS)
    assert "test_step_check.py:" in str(caught.value)
    assert ", broken_loss)" in str(caught.value)
    assert caught.value.traceback.startswith("Traceback (most recent call last):")


def test_settings_that_a_loss_refuses_are_bad_input_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*arguments: Any) -> Any:
        del arguments
        raise InputError("lower objective.difference.")

    monkeypatch.setattr(FlowMatching, "loss", refusing)
    with pytest.raises(UserError, match=r"^trial trial-07: lower objective.difference\.$"):
        check_first_steps([("trial-07", small_experiment("objective={method: flow_matching}"))], DIGITS)


def test_trials_that_differ_in_seed_or_length_alone_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    loss = FlowMatching.loss

    def counted(self: FlowMatching, *arguments: Any) -> Any:
        steps.append(self)
        return loss(self, *arguments)

    monkeypatch.setattr(FlowMatching, "loss", counted)
    flow_matching = "objective={method: flow_matching}"
    experiments = [
        small_experiment(flow_matching),
        small_experiment(flow_matching, "seed=5", "training.steps=8"),
        small_experiment(flow_matching, "optimizer.lr=0.5"),
    ]
    check_first_steps([(str(number), each) for number, each in enumerate(experiments)], DIGITS)
    assert len(steps) == 2


def test_a_large_network_becomes_a_small_one_with_the_same_conditions() -> None:
    large = dit_config("XL/2", 4, 32, 32, classes=1000, null_label=True, guidance_scale=True)
    small = large.small()
    assert sum(p.numel() for p in DiT(small).parameters()) < 200_000
    assert (small.height, small.width, small.patch) == (8, 8, 2)
    same = {"height": 32, "width": 32, "hidden": 1152, "depth": 28, "heads": 16}
    assert replace(small, **same) == large


def test_the_tried_step_leaves_the_random_generator_where_it_was() -> None:
    before = torch.get_rng_state()
    check_first_steps([("trial", small_experiment())], DIGITS)
    assert torch.equal(torch.get_rng_state(), before)
