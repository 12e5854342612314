"""However many workers are asked for, all of them find a place on the cluster."""

from __future__ import annotations

import pytest

from soflow_platform.cluster.actor_pool import share_cluster
from soflow_platform.cluster.connection import Cluster


@pytest.mark.parametrize("gpus", [0.0, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("workers", [None, 1, 2, 3, 7, 40])
def test_all_workers_fit_the_cluster(gpus: float, workers: int | None) -> None:
    cluster = Cluster("local", True, cpus=6.0, gpus=gpus, nodes=1, machines=1)
    share = share_cluster(cluster, tasks=100, uses_gpu=True, workers=workers)
    assert share.actors == (workers or int(gpus or cluster.cpus))
    assert share.actors * share.cpus <= cluster.cpus
    assert share.actors * share.gpus <= gpus
    assert share.cpus > 0
    assert share.threads >= 1
    assert (share.gpus > 0) == (gpus > 0)


def test_there_are_no_more_workers_than_tasks() -> None:
    cluster = Cluster("local", True, cpus=6.0, gpus=0.0, nodes=1, machines=1)
    assert share_cluster(cluster, tasks=2, uses_gpu=False, workers=5).actors == 2
