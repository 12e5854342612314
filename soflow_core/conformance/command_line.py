"""Options of the conformance suite, and the parts that its tests are run for."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from soflow_core import plugins
from soflow_core.conformance.part_kinds import KINDS
from soflow_core.registration import Registry


def pytest_addoption(parser: pytest.Parser) -> None:
    for kind in KINDS:
        parser.addoption(
            f"--{kind}",
            action="append",
            default=[],
            metavar="MODULE:CLASS",
            help=f"test this {kind}: a class of a module or file, or a registered name",
        )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: longer checks")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = any(metafunc.config.getoption(f"--{kind}") for kind in KINDS)
    for kind, registry_of in KINDS.items():
        argument = f"{kind}_class"
        if argument in metafunc.fixturenames:
            registry = registry_of()
            named = metafunc.config.getoption(f"--{kind}")
            parts = [find(registry, each) for each in named] if chosen else list(registry.values())
            metafunc.parametrize(argument, parts, ids=[str(vars(part)[registry.field]) for part in parts])


def find(registry: Registry[Any], name: str) -> type[Any]:
    """A registered class by its name, or by `MODULE:CLASS` or `FILE.py:CLASS`. Raises UsageError where there is none."""
    place, colon, class_name = name.rpartition(":")
    if not colon:
        if name not in registry:
            raise pytest.UsageError(f"there is no {registry.kind} {name!r}; known are {', '.join(registry)}")
        return registry[name]
    try:
        module = importlib.import_module(plugins.load(place).module)
    except plugins.PluginError as error:
        raise pytest.UsageError(str(error)) from None
    part: Any = getattr(module, class_name, None)
    if part not in registry.values():
        raise pytest.UsageError(f"{name} is no {registry.kind}: name a class with @register")
    found: type[Any] = part
    return found
