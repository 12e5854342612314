"""The documents name every setting, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from soflow_platform.cli.main import app
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.search import AshaConfig

ROOT = Path(__file__).parents[2]
SECTIONS = {
    name: field.annotation
    for name, field in Experiment.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_stands_in_the_document(section: str) -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text()
    words = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]+)`", text))))
    assert [key for key in SECTIONS[section].model_fields if key not in words] == []


def test_every_section_is_documented() -> None:
    assert {
        "data",
        "network",
        "training",
        "evaluation",
        "search",
        "resources",
        "tracking",
        "registry",
    } == set(SECTIONS)
    assert issubclass(AshaConfig, BaseModel)


def test_the_readme_shows_only_commands_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    known = {command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    shown = set(re.findall(r"soflowctl ([a-z]+)", text))
    assert shown
    assert shown <= known


@pytest.mark.parametrize("document", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#:]+)\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []
