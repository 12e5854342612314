"""A plugin reaches the processes of a Ray cluster that cannot see its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from soflow_core import plugins
from soflow_core.objectives import OBJECTIVES
from soflow_platform.cluster.connection import connected
from tests.support.plugin_files import restored_registries, write_plugins


def made_elsewhere(record: dict[str, str]) -> tuple[str, str, str]:
    """In a worker: the method's class by name and by record, and where its module is."""
    import sys

    found = OBJECTIVES["weighted_flow"].__name__ if "weighted_flow" in OBJECTIVES else "not registered"
    return found, plugins.load_recorded(record).digest, str(sys.modules["weighted_flow"].__file__)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_imports_a_plugin_whose_file_it_does_not_have(tmp_path: Path) -> None:
    import ray

    method, network = write_plugins(tmp_path)
    with restored_registries():
        plugin = plugins.load(str(method))
        plugins.load(str(network))
        objective = OBJECTIVES["weighted_flow"](factor=5.0)  # type: ignore[call-arg]
        with connected(None):
            method.unlink()
            record = {"module": plugin.module, "path": plugin.path, "digest": plugin.digest}
            found, digest, place = ray.get(ray.remote(made_elsewhere).remote(record))
            sent = ray.get(ray.remote(lambda each: (each, each.factor)).remote(objective))
    assert (found, digest) == ("WeightedFlow", plugin.digest)
    assert Path(place) != method
    assert sent == (objective, 5.0)
