"""Ray's private modules are used in one module, and are where the pinned Ray keeps them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from soflow_platform.cluster.ray_internals import PRIVATE_NAMES, TRIED_WITH, private

ROOT = Path(__file__).parents[3]


def test_this_ray_is_one_that_its_private_names_were_tried_with() -> None:
    assert version("ray").rpartition(".")[0] in TRIED_WITH


@pytest.mark.parametrize("key", PRIVATE_NAMES)
def test_a_private_name_of_ray_is_where_it_is_looked_for(key: str) -> None:
    assert callable(private(key))


def test_the_coordinator_takes_a_request_back() -> None:
    assert callable(private("coordinator").cancel_request)


def test_no_other_module_imports_a_private_module_of_ray() -> None:
    uses = [
        path.name
        for folder in ("platform", "pipelines", "soflow_core")
        for path in (ROOT / folder).rglob("*.py")
        if "ray." in path.read_text() and "._internal" in path.read_text()
    ]
    assert uses == ["ray_internals.py"]
