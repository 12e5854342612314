"""docs/sweeps.md lists every key of every section, each in the table of its section, and no other."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from soflow_core.networks import NETWORKS
from soflow_core.objectives import OBJECTIVES, SoFlow
from soflow_core.objectives.alpha_schedule import ALPHAS
from soflow_core.optimizer import OptimizerConfig
from soflow_core.parameterization import PARAMETERIZATIONS
from soflow_core.paths import PATHS
from soflow_core.registration import Registry
from soflow_core.samplers.base import SAMPLERS
from soflow_core.samplers.grids import GRIDS
from soflow_core.schedule_shapes import DECAYS, SHAPES
from soflow_core.times import TIMES
from soflow_pipelines.features.registry import FEATURES
from soflow_pipelines.images.autoencoder import AUTOENCODERS
from soflow_pipelines.metrics import METRICS
from soflow_pipelines.sources.opening import SOURCES
from soflow_platform.config.comparison import SamplingConfig
from soflow_platform.config.dimensions import Dimension
from soflow_platform.config.experiment import DECIDING_TRAINING, LATER_TRAINING_SETTINGS, Experiment
from soflow_platform.config.gate import GateConfig, GuardConfig
from soflow_platform.config.mid_run import SettingsChange
from soflow_platform.config.search import AshaConfig, FinalConfig, PbtConfig
from soflow_platform.config.sections import NetworkConfig
from soflow_platform.config.training import AlignmentConfig

PAGE = (Path(__file__).parents[2] / "docs" / "sweeps.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type] = {
    **{
        name: kind
        for name, field in Experiment.model_fields.items()
        if hasattr(kind := field.annotation, "model_fields")
    },
    "network": NetworkConfig,
    "optimizer": OptimizerConfig,
    "objective": SoFlow,
    "comparison": SamplingConfig,
    "search.space": Dimension,
    "search.final": FinalConfig,
    "search.asha": AshaConfig,
    "training.alignment": AlignmentConfig,
    "search.pbt": PbtConfig,
    "training.changes": SettingsChange,
    "registry.gate": GateConfig,
    "registry.gate.guards": GuardConfig,
}


def tables(text: str) -> Iterator[tuple[str, list[list[str]]]]:
    """(heading, the cells of each row) of the first table under each heading; the head of the page has the heading ''."""
    for part in re.split(r"^(?=##+ )", text, flags=re.MULTILINE):
        heading = re.match(r"##+ (.+)", part)
        rows = re.findall(r"^\| (.+) \|$", part.split("\n\n|", 1)[-1].split("\n\n")[0], re.MULTILINE)
        yield heading[1] if heading else "", [row.split(" | ") for row in rows]


def listed(heading: str) -> list[str]:
    """Keys in the first column of a section's table, in order."""
    (rows,) = (rows for name, rows in tables(PAGE) if name == heading)
    return [key for row in rows for key in re.findall(r"`([\w.]+)`", row[0])]


def keys(kind: type) -> list[str]:
    """Keys of a section; those of a dataclass within it as `outer.inner`, and a time distribution as one."""
    if hasattr(kind, "model_fields"):
        return list(kind.model_fields)
    hints: dict[str, Any] = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            found += [f"{field.name}.{name}" for name in keys(inner)]  # type: ignore[arg-type]
        else:
            found.append(field.name)
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_the_table_of_a_section_lists_its_keys_and_no_other(section: str) -> None:
    assert sorted(listed(section)) == sorted(keys(SECTIONS[section]))


def test_the_first_table_lists_the_keys_outside_sections() -> None:
    assert set(listed("")) == set(Experiment.model_fields) - SECTIONS.keys()


PAGES_OF_PARTS: list[tuple[str, Registry[Any]]] = [
    ("methods.md", OBJECTIVES),
    ("methods.md", SAMPLERS),
    ("methods.md", GRIDS),
    ("methods.md", PATHS),
    ("methods.md", PARAMETERIZATIONS),
    ("methods.md", TIMES),
    ("methods.md", ALPHAS),
    ("sweeps.md", SHAPES),
    ("sweeps.md", DECAYS),
    ("sweeps.md", NETWORKS),
    ("evaluation.md", METRICS),
    ("evaluation.md", FEATURES),
    ("data.md", SOURCES),
    ("data.md", AUTOENCODERS),
]


@pytest.mark.parametrize(("page", "registry"), PAGES_OF_PARTS, ids=lambda each: getattr(each, "kind", each))
def test_every_registered_part_is_on_the_page_of_its_kind(page: str, registry: Registry[Any]) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    # `name`, `--option name`, `method: name`, `name:PATH`
    code = " ".join(re.findall(r"`([^`\n]+)`", text))
    assert [name for name in registry if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", code)] == []


def test_the_objective_names_methods_that_there_are() -> None:
    (rows,) = (rows for name, rows in tables(PAGE) if name == "objective")
    (methods,) = (row[2] for row in rows if row[0] == "`method`")
    assert set(re.findall(r"`(\w+)`", methods)) <= set(OBJECTIVES)


def test_the_page_says_which_settings_of_the_training_are_in_a_sweeps_digest() -> None:
    (paragraph,) = (part for part in PAGE.split("\n\n") if "In the digest are" in part)
    training = paragraph.partition("and of `training`")[2].partition("Everything else")[0]
    named = {name for name in re.findall(r"`([\w.]+)`", training) if not name.startswith("start_")}
    deciding = {*DECIDING_TRAINING, *LATER_TRAINING_SETTINGS}
    assert named == {name for name in deciding if not name.startswith("start_")}
