"""docs/dependencies.md, pyproject.toml and the imports of the code name the same packages, and what is installed fits together."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata

import pytest

from tests.support.commands import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
OWN = {"soflow_core", "soflow_pipelines", "soflow_platform"}
PART_OF = {"pydantic-core": "pydantic"}
"""Distributions of which another one takes exactly one version."""


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", requirement).group().lower() for requirement in requirements}  # type: ignore[union-attr]


def rows(title: str) -> list[list[str]]:
    """Cells of the rows of a section's table."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def test_the_page_has_every_dependency_with_purpose_alternative_and_licence_and_no_other() -> None:
    assert {row[0].lower() for row in rows("Always installed")} == names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    told = {(row[0].lower(), extra) for row in rows("Extras") for extra in row[1].split(", ")}
    development = {row[0].lower() for row in rows("For development")}
    shared = {name for name, extra in told if extra == "dev"}
    assert {(name, extra) for name, extra in told if extra != "dev"} == {
        (name, extra) for extra in extras if extra != "dev" for name in names(extras[extra])
    }
    assert development | shared == names(extras["dev"])
    assert all(all(row) for title in ("Always installed", "Extras", "For development") for row in rows(title))


def test_the_code_imports_declared_packages_alone() -> None:
    """A package that comes with another one is gone when that one no longer needs it."""
    folders = [ROOT / "soflow_core", ROOT / "pipelines", ROOT / "platform"]
    found = {
        name.split(".")[0]
        for folder in folders
        for path in folder.rglob("*.py")
        # Who runs the conformance tests has pytest.
        if "conformance" not in path.parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }
    modules = metadata.packages_distributions()
    declared = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["onnx"])
    outside = found - OWN - set(sys.stdlib_module_names)
    distributions = {
        name: {d.lower().replace("_", "-") for d in modules.get(name, [name])} for name in outside
    }
    missing = {
        name for name, owners in distributions.items() if not {PART_OF.get(o, o) for o in owners} & declared
    }
    assert missing == set()


def test_every_dependency_is_pinned() -> None:
    pinned = names(
        re.findall(r"^[\w.-]+==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    )
    everything = names(PROJECT["dependencies"]).union(*map(names, PROJECT["optional-dependencies"].values()))
    assert everything - pinned == set()


@pytest.mark.slow
def test_what_is_installed_fits_together() -> None:
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
