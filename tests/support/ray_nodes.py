"""A Ray cluster of several nodes, as processes on this machine, whose own soflow cannot be imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.object_store import free_port

PACKAGES = ("soflow_core", "soflow_pipelines", "soflow_platform")


@contextlib.contextmanager
def ray_nodes(
    folder: Path, nodes: int = 2, ray_version: str | None = None, token: str | None = None
) -> Iterator[str]:
    """Address of a head without work of its own, with nodes of one CPU each.

    What the nodes find under the names of soflow's packages, before anything that is installed, raises ImportError: a worker that
    imports them has been sent others. `ray_version` is what the head says of itself. With a `token` the nodes ask for it.
    """
    for package in PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text("raise ImportError('the code of the node')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token" if token else "disabled")
        if token:
            patch.setenv("RAY_AUTH_TOKEN", token)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", ""))))
        import ray
        from ray.cluster_utils import Cluster

        if ray_version is not None:
            patch.setattr(ray, "__version__", ray_version)
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=1)
            patch.undo()
            yield str(cluster.address)
        finally:
            cluster.shutdown()
