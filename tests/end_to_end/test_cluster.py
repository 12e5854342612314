"""The same sweep on a Ray cluster that runs already, of several nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import all_records
from tests.support.commands import REDUCED, Run
from tests.support.object_store import free_port

ONE_TRIAL = ["--set", "search.space={objective.weight_power: [1.0]}", "--set", "resources.workers=2"]


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A head without work of its own and two nodes of one CPU each, as processes on this machine."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield str(cluster.address)
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_two_workers_on_two_nodes_train_one_network(soflowctl: Run, address: str, tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    arguments = ["run", "digits", "--storage", str(storage.root), *REDUCED, *ONE_TRIAL]
    done = soflowctl(*arguments, "--address", address)
    assert done.returncode == 0, done.stderr
    assert "on 2 CPU, 0 GPU, 3 node(s)" in done.stdout
    (record,) = all_records(storage)
    tracking = Tracking(TrackingStore(storage.tracking_uri), record.experiment_id or "")
    (run,) = tracking.children(record.run or "")
    two = [
        m.value
        for m in TrackingStore(storage.tracking_uri).client.get_metric_history(
            run.info.run_id, "train/grad_norm"
        )
    ]

    alone = ProjectFolder(tmp_path / "alone")
    single = ["run", "digits", "--storage", str(alone.root), *REDUCED, *ONE_TRIAL[:2]]
    assert soflowctl(*single).returncode == 0
    (other,) = all_records(alone)
    (run,) = Tracking(TrackingStore(alone.tracking_uri), other.experiment_id or "").children(other.run or "")
    one = [
        m.value
        for m in TrackingStore(alone.tracking_uri).client.get_metric_history(
            run.info.run_id, "train/grad_norm"
        )
    ]
    assert two == pytest.approx(one, rel=1e-3)
