"""`soflowctl help`: what the sections and registered parts say of themselves."""

from __future__ import annotations

import re
import typing

import pytest

from soflow_core.objectives import OBJECTIVES
from soflow_core.part_docs import settings_of, summary
from soflow_core.registration import Registry
from soflow_platform.cli.help import _registries, _sections, help_command
from soflow_platform.cli.options import SweepArgument
from soflow_platform.config.presets import sweeps_folder
from soflow_platform.errors import UserError


def shown(topic: str | None, capsys: pytest.CaptureFixture[str]) -> str:
    help_command(topic)
    return capsys.readouterr().out


def test_every_section_and_part_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    listed = set(re.findall(r"[\w-]+", shown(None, capsys)))
    assert listed >= set(_sections())
    for registry in _registries():
        assert listed >= set(registry)


@pytest.mark.parametrize("topic", ["samplers", "sampler"])
def test_a_kind_lists_its_parts_with_their_first_lines(
    topic: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(r"heun +Second order, two evaluations a step\.", shown(topic, capsys))


def test_a_part_has_its_settings_with_defaults_and_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("meanflow", capsys)
    assert "training method meanflow: Settings of MeanFlow" in text
    assert "  derivative = jvp  How dF/dt is computed" in text
    assert "  guidance.drop = 0.1" in text
    assert "method =" not in text


def test_a_section_has_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("training", capsys)
    assert re.search(r"^  steps required", text, re.MULTILINE)
    assert re.search(r"^  batch = 256", text, re.MULTILINE)


def test_an_unknown_topic_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="there is no section or part 'meanflo'; did you mean meanflow"):
        help_command("meanflo")


@pytest.mark.parametrize("registry", _registries(), ids=lambda registry: registry.kind)
def test_every_part_says_what_it_is(registry: Registry[object]) -> None:
    for name, part in registry.items():
        assert summary(part).endswith((".", ":")) or " " in summary(part), name
    if registry is OBJECTIVES:
        for part in registry.values():
            assert {each.name for each in settings_of(part)} >= {"method"}


def test_every_sweep_that_comes_with_soflow_is_named() -> None:
    (_, argument) = typing.get_args(SweepArgument)
    named = set(re.findall(r"[\w-]+", argument.help))
    shipped = {path.stem.removesuffix("-tuned") for path in sweeps_folder().glob("*.yaml")}
    assert shipped - named == set()
