"""What a plan says of a network agrees with the network that is built."""

from __future__ import annotations

import pytest

from soflow_core.failures import InputError
from soflow_core.networks import DiTConfig
from soflow_pipelines.preparation.builtin import BUILTIN
from soflow_platform.training.flops import second_head_flops
from soflow_platform.training.model import describe_network
from soflow_platform.tuning.plan import plan_trial
from soflow_platform.tuning.plan_assumptions import Assumptions
from soflow_platform.tuning.search_space import Trial
from tests.platform.conftest import small_experiment

NETWORKS = [
    DiTConfig(1, 8, 8, patch=2, hidden=96, depth=4, heads=4, classes=10, null_label=True),
    DiTConfig(1, 8, 8, patch=2, hidden=32, depth=1, heads=2, classes=10),
    DiTConfig(1, 8, 8, patch=2, hidden=32, depth=1, heads=2, classes=10, guidance_scale=True),
    DiTConfig(4, 32, 16, patch=4, hidden=48, depth=3, heads=3, mlp_ratio=2.7),
]


@pytest.mark.parametrize("network", NETWORKS)
def test_parameters_are_counted_without_building_the_network(network: DiTConfig) -> None:
    assert network.parameters() == sum(p.numel() for p in network.build().parameters())


def test_a_second_head_is_counted_in_plan_and_throughput() -> None:
    two, one = (
        small_experiment(
            f"objective={{method: improved_meanflow, velocity_head: {head}}}", f"network={network}"
        )
        for head, network in (
            ("true", "{patch: 4, hidden: 16, depth: 2, heads: 2, velocity_blocks: 1}"),
            ("false", "{patch: 4, hidden: 16, depth: 2, heads: 2}"),
        )
    )
    network = describe_network(two, BUILTIN["digits"])
    # One pass through both heads, with gradient.
    added = 3 * network.second_head_flops()
    assert second_head_flops(network, two.objective, 8) == added > 0
    plans = [plan_trial(Trial(0, "trial", {}, each, ("steps",)), Assumptions()) for each in (two, one)]
    assert plans[0].image_flops - plans[1].image_flops == pytest.approx(added)
    assert plans[0].parameters > plans[1].parameters
    assert second_head_flops(describe_network(one, BUILTIN["digits"]), one.objective, 8) == 0


@pytest.mark.parametrize(
    ("objective", "blocks", "message"),
    [
        ("{method: improved_meanflow, velocity_head: true}", 0, "set network.velocity_blocks above 0"),
        ("{method: soflow}", 1, "second head that soflow with these settings does not train"),
        ("{method: improved_meanflow}", 1, "set objective.velocity_head to true"),
    ],
)
def test_a_head_that_nothing_trains_is_refused(objective: str, blocks: int, message: str) -> None:
    experiment = small_experiment(f"objective={objective}", f"network.velocity_blocks={blocks}")
    with pytest.raises(InputError, match=message):
        describe_network(experiment, BUILTIN["digits"])
