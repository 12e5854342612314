"""Sweep files that name plugins: their sections, the record, the digest, and the sentence where a plugin is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from soflow_core.networks import Architecture
from soflow_pipelines.preparation.builtin import Expected
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import read_experiment, resolved_experiment
from soflow_platform.errors import UserError
from soflow_platform.training.model import describe_network
from soflow_platform.training.step_check import check_first_steps
from tests.support.plugin_files import restored_registries, write_plugins

DIGITS = Path(__file__).parents[3] / "sweeps" / "digits.yaml"
DATA = Expected((1, 8, 8), 10)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    with restored_registries():
        yield


def overrides(tmp_path: Path, objective: str = "{method: weighted_flow, factor: 3}") -> tuple[str, ...]:
    method, network = write_plugins(tmp_path)
    return (
        f"plugins=[{method}, {network}]",
        f"objective={objective}",
        "network={kind: convolution, kernel: 1}",
        "search={}",
    )


def test_a_file_that_names_plugins_has_their_sections(tmp_path: Path) -> None:
    experiment, _ = read_experiment(DIGITS, overrides(tmp_path))
    assert (experiment.objective.method, experiment.objective.factor) == ("weighted_flow", 3)
    architecture: Architecture = describe_network(experiment, DATA)
    assert (architecture.title, architecture.sample_shape, architecture.classes) == (
        "Convolution-1",
        (1, 8, 8),
        10,
    )
    assert architecture.parameters() == 2
    check_first_steps([("trial", experiment)], DATA)
    assert experiment.network.title == "convolution"
    assert Experiment(**experiment.resolved()) == experiment


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("objective.fctor=1",),
            "--set objective.fctor: unknown key `fctor` in `objective`; did you mean `factor`?",
        ),
        (
            ("network.kernal=1",),
            "--set network.kernal: unknown key `kernal` in `network`; did you mean `kernel`?",
        ),
        (("network.kernel=wide",), "`network.kernel` is 'wide': input should be a valid integer"),
        (("network.kind=net",), "unknown kind 'net' in `network`; known are dit, unet, convolution"),
        (
            ("plugins=[absent_plugin]",),
            "--set plugins: there is no module absent_plugin to import as a plugin",
        ),
    ],
)
def test_settings_of_a_plugin_are_checked_as_those_of_the_platform(
    changes: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        read_experiment(DIGITS, (*overrides(tmp_path), *changes))
    assert message in str(caught.value)


def test_the_source_of_a_plugin_decides_which_sweep_it_is(tmp_path: Path) -> None:
    digests = []
    for number in range(2):
        with restored_registries():
            settings = overrides(tmp_path)
            file = tmp_path / "weighted_flow.py"
            file.write_text(file.read_text() + f"# {number}\n")
            digests.append(read_experiment(DIGITS, settings)[0].digest())
    assert digests[0] != digests[1]


def test_a_record_whose_plugin_is_missing_says_so(tmp_path: Path) -> None:
    with restored_registries():
        record = read_experiment(DIGITS, overrides(tmp_path))[0].resolved()
    digest = record["plugins"][0]["digest"]
    for file in tmp_path.glob("*.py"):
        file.unlink()
    with pytest.raises(UserError) as caught:
        resolved_experiment(record, "sweep mine-1")
    assert str(caught.value) == (
        f"sweep mine-1: it needs the plugin weighted_flow (sha256 {digest[:12]}), which is not here: install it, or name its file "
        "in SOFLOW_PLUGINS."
    )
    record["plugins"] = []
    with pytest.raises(
        UserError, match=r"sweep mine-1 cannot be read: `network`: .*name the plugin in SOFLOW_PLUGINS"
    ):
        resolved_experiment(record, "sweep mine-1")


TIMES = '''"""Times of one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from soflow_core.registration import register
from soflow_core.times import TimeDistribution


@register("narrow")
@dataclass(frozen=True)
class Narrow(TimeDistribution):
    """Times around a middle."""

    middle: float = 0.5

    def from_normal(self, normal):
        return self.middle + 0.1 * torch.tanh(normal)
'''


@pytest.fixture
def times_plugin(tmp_path: Path) -> str:
    file = tmp_path / "mode_times.py"
    file.write_text(TIMES, encoding="utf-8")
    return f"plugins=[{file}]"


def test_a_distribution_of_times_of_a_plugin_is_a_section(times_plugin: str) -> None:
    other, own = (f"objective.times.velocity={{kind: narrow, middle: {middle}}}" for middle in (0, 1))
    experiment, _ = read_experiment(DIGITS, (times_plugin, own, "search={}"))
    plain, _ = read_experiment(DIGITS, ("search={}",))
    velocity = experiment.objective.times.velocity
    assert (velocity.kind, velocity.middle) == ("narrow", 1.0)
    assert experiment.resolved()["objective"]["times"]["velocity"] == {"kind": "narrow", "middle": 1.0}
    assert experiment.objective.times.start == plain.objective.times.start
    assert Experiment(**experiment.resolved()) == experiment
    assert read_experiment(DIGITS, (times_plugin, other, "search={}"))[0].digest() != experiment.digest()
    named, _ = read_experiment(DIGITS, ("objective.times.velocity.kind=logit_normal", "search={}"))
    assert named.digest() == plain.digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("objective.times.velocity={kind: narow}",),
            "unknown kind 'narow' in `objective.times.velocity`; known are logit_normal, uniform, narrow",
        ),
        (
            ("objective.times.velocity={kind: narrow, midle: 1}",),
            "unknown key `midle` in `objective.times.velocity`; did you mean `middle`?",
        ),
        (
            ("objective.times.velocity={kind: narrow, middle: wide}",),
            "`objective.times.velocity.middle` is 'wide': input should be a valid number",
        ),
        (("objective.times.velocity=[1]",), "`objective.times.velocity` is [1]: "),
        (
            ("objective.path=crooked",),
            "--set objective.path: `objective`: path is 'crooked'; it is one of 'linear', 'trigonometric'",
        ),
        (
            ("objective.schedule.kind=straight",),
            "kind is 'straight'; it is one of 'constant', 'linear', 'cosine', 'exponential'",
        ),
        (
            ("optimizer.decay=exponential",),
            "decay is 'exponential'; it is one of 'constant', 'linear', 'cosine'",
        ),
    ],
)
def test_names_of_parts_are_checked_against_the_registry(
    changes: tuple[str, ...], message: str, times_plugin: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_experiment(DIGITS, (times_plugin, *changes))
    assert message in str(caught.value)
