"""The house has four floors, and each imports only the floors below it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "soflow_core": ROOT / "soflow_core",
    "soflow_pipelines": ROOT / "pipelines" / "soflow_pipelines",
    "soflow_platform": ROOT / "platform" / "soflow_platform",
}
BELOW = {
    "soflow_core": set(),
    "soflow_pipelines": {"soflow_core"},
    "soflow_platform": {"soflow_core", "soflow_pipelines"},
}
PACKAGES = {
    "soflow_pipelines": [
        "storage",
        "images",
        "shards",
        "sources",
        "preparation",
        "features",
        "metrics",
        "references",
        "conformance",
    ],
    "soflow_platform": [
        "storage",
        "config",
        "cluster",
        "tracking",
        "generation",
        "evaluation",
        "training",
        "registry",
        "tuning",
        "jobs",
        "cli",
    ],
}
"""The packages of a floor, lowest first: each imports only those before it."""
CORE_MAY_IMPORT = {"torch", "safetensors"}
FROM_PLATFORM_UP = {"ray", "mlflow"}
FROM_PIPELINES_UP = {"webdataset"}


def modules(floor: str) -> Iterator[Path]:
    yield from sorted(FLOORS[floor].rglob("*.py"))


@cache
def nodes(path: Path) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """The import statements of a file, wherever they stand in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every import in a file: (line, dotted name)."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def offences(floor: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(floor)
        for line, name in imported(path)
        if name.split(".")[0] in forbidden
    ]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_floor_imports_upwards(floor: str) -> None:
    assert list(modules(floor)), f"{floor} has no modules: the test looks at the wrong place"
    assert offences(floor, set(FLOORS) - BELOW[floor] - {floor}) == []


def test_the_core_needs_torch_and_safetensors_alone() -> None:
    allowed = CORE_MAY_IMPORT | set(sys.stdlib_module_names) | {"soflow_core"}
    suite = FLOORS["soflow_core"] / "conformance"
    for path in modules("soflow_core"):
        found = {name.split(".")[0] for _, name in imported(path)}
        # The conformance suite is a suite of pytest, which nothing else imports.
        assert found - allowed - ({"pytest"} if path.parent == suite else set()) == set()


def test_ray_and_mlflow_stay_on_the_platform() -> None:
    assert offences("soflow_core", FROM_PLATFORM_UP | FROM_PIPELINES_UP) == []
    assert offences("soflow_pipelines", FROM_PLATFORM_UP) == []


def package_of(floor: str, path: Path) -> str:
    return path.relative_to(FLOORS[floor]).parts[0]


@pytest.mark.parametrize("floor", PACKAGES)
def test_every_package_of_a_floor_has_its_place_in_the_order(floor: str) -> None:
    found = {path.parent.name for path in FLOORS[floor].glob("*/__init__.py")}
    assert found == set(PACKAGES[floor])


@pytest.mark.parametrize("floor", PACKAGES)
def test_packages_import_only_those_before_them(floor: str) -> None:
    """Imports inside functions count too."""
    place = {name: number for number, name in enumerate(PACKAGES[floor])}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}: {package_of(floor, path)} comes before {parts[1]}"
        for path in modules(floor)
        if package_of(floor, path) in place
        for line, name in imported(path)
        if len(parts := name.split(".")) > 1 and parts[0] == floor and parts[1] in place
        if place[parts[1]] > place[package_of(floor, path)]
    ]
    assert wrong == []


def test_no_two_floors_have_a_module_of_one_name() -> None:
    """So that a name alone leads to one file; packages of a floor may repeat one."""
    names = {floor: {path.stem for path in modules(floor)} - {"__init__"} for floor in FLOORS}
    floors = list(FLOORS)
    shared = {(one, other): names[one] & names[other] for one in floors for other in floors if one < other}
    assert {pair: both for pair, both in shared.items() if both} == {}


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too: they hide a circle, they do not undo it."""
    known = {
        ".".join((floor, *path.relative_to(FLOORS[floor]).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): path
        for floor in FLOORS
        for path in modules(floor)
    }
    needs = {name: {n for n in _imports(path, known) if n != name} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for needed in sorted(needs[name]):
                visit(needed, (*trail, name))
            done.add(name)

    for name in sorted(known):
        visit(name, ())


def _imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & set(known)
            yield from submodules or {node.module}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def test_platform_is_never_a_package() -> None:
    """A package of that name would hide Python's own `platform` and break `import uuid`."""
    assert not (ROOT / "platform" / "__init__.py").exists()
