"""Ray's private modules are used in one module, and are where the pinned Ray keeps them."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from soflow_platform.cluster.ray_internals import (
    KEYS,
    PRIVATE_NAMES,
    TRIED_WITH,
    keep_keys_out_of_logs,
    private,
)

ROOT = Path(__file__).parents[3]


def test_this_ray_is_one_that_its_private_names_were_tried_with() -> None:
    assert version("ray").rpartition(".")[0] in TRIED_WITH


@pytest.mark.parametrize("key", PRIVATE_NAMES)
def test_a_private_name_of_ray_is_where_it_is_looked_for(key: str) -> None:
    assert private(key) is not None


def test_the_coordinator_takes_a_request_back() -> None:
    assert callable(private("coordinator").cancel_request)


def test_tune_passes_no_keys_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.tune.execution.class_cache import _ActorClassCache

    passed = private("passed_variables")
    # A test before this one may have connected to a Ray, which takes them off.
    passed.update(KEYS)
    for name in KEYS:
        monkeypatch.setenv(name, "a-secret")
    assert "a-secret" in str(
        _ActorClassCache().get(type("Trainable", (), {}))._default_options["runtime_env"]
    )
    keep_keys_out_of_logs()
    trainable = _ActorClassCache().get(type("Trainable", (), {}))
    assert "a-secret" not in str(trainable._default_options["runtime_env"])


def test_no_other_module_imports_a_private_module_of_ray() -> None:
    uses = [
        path.name
        for folder in ("platform", "pipelines", "soflow_core")
        for path in (ROOT / folder).rglob("*.py")
        if "ray." in path.read_text() and "._internal" in path.read_text()
    ]
    assert uses == ["ray_internals.py"]
