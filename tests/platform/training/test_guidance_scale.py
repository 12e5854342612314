"""A sweep that trains a range of guidance scales: its network, its cost, and how it is sampled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from soflow_core.guidance import Guidance, ScaleRange
from soflow_core.objectives import SoFlow
from soflow_pipelines.preparation.builtin import Expected
from soflow_platform.config.sampling_settings import with_sampling
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from soflow_platform.generation.sampling import sampling_facts
from soflow_platform.training.flops import forward_gmac
from soflow_platform.training.model import describe_network

DIGITS = Path(__file__).parents[3] / "sweeps" / "digits.yaml"
DATA = Expected((1, 8, 8), 10)
RANGE = "objective.guidance.scale={low: 1, high: 4}"
TRAINED = SoFlow(guidance=Guidance(scale=ScaleRange(1.0, 4.0)))


def test_a_range_of_scales_makes_a_network_with_the_scale_as_a_condition() -> None:
    one, _ = read_experiment(DIGITS)
    ranged, _ = read_experiment(DIGITS, (RANGE,))
    assert ranged.objective.guidance.scale == ScaleRange(1.0, 4.0)
    plain, conditioned = describe_network(one, DATA), describe_network(ranged, DATA)
    assert conditioned == replace(plain, guidance_scale=True)
    unlabelled, _ = read_experiment(DIGITS, (RANGE, "data.conditional=false"))
    assert not describe_network(unlabelled, DATA).guidance_scale


def test_the_condition_is_counted_in_parameters_and_flops() -> None:
    network = describe_network(read_experiment(DIGITS)[0], DATA)
    conditioned, d = replace(network, guidance_scale=True), network.hidden
    assert conditioned.parameters() - network.parameters() == 256 * d + d * d + 2 * d
    added = forward_gmac(conditioned) - forward_gmac(network)
    assert added == pytest.approx((256 * d + d * d) / 1e9, rel=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.guidance.scale={low: 1, hihg: 4}", "unknown key `hihg` in `objective.guidance.scale`"),
        ("objective.guidance.scale={low: 3, high: 2}", "give 1 <= low < high"),
        ("objective.guidance.scale={low: 2}", "`objective.guidance.scale.high` is missing"),
        ("objective.guidance.scale={low: 1, high: much}", "`objective.guidance.scale.high` is 'much': input"),
        (
            "objective.guidance.scale=much",
            "`objective.guidance.scale` is 'much': input should be a valid number",
        ),
        ("objective.sampling_scale=2", "a range there (low, high) trains a network for any scale of it"),
    ],
)
def test_a_range_that_cannot_be_is_refused_in_one_sentence(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_experiment(DIGITS, (override,))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_trained_range_is_sampled_at_any_of_its_scales() -> None:
    sampled = with_sampling(TRAINED, {"sampling_scale": 3.0})
    assert sampled == replace(TRAINED, sampling_scale=3.0)
    assert sampling_facts(sampled) == {"sampling_scale": "3.0"}
    assert sampling_facts(TRAINED) == {"sampling_scale": "2.0"}
    assert sampling_facts(SoFlow()) == {}
    with pytest.raises(UserError, match=r"soflow: sampling_scale is 5.0; the network is trained on scales"):
        with_sampling(TRAINED, {"sampling_scale": 5.0})
    with pytest.raises(UserError, match=r"soflow: sampling_scale is 2.0; guidance.scale is 3.0, and a range"):
        with_sampling(SoFlow(), {"sampling_scale": 2.0})
