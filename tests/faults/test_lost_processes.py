"""Processes and nodes that die: the trial goes on from its checkpoint, under the same run, with no step logged twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from soflow_platform.cluster.ray_internals import start_autoscaling_coordinator
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.stop_request import request_stop
from tests.support.watched import BATCH, LOG_EVERY, Outcome, Watched

pytestmark = pytest.mark.faults
Note = Callable[[Outcome], None]


@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    tmp_path: Path, outcome: Note, count: int
) -> None:
    sweep = Watched(
        ProjectFolder(tmp_path / "runs"), f"resources.workers={count}", steps=1500, every=500, save_every=100
    )
    sweep.trains()
    victims = sweep.workers
    assert len(victims) == count
    since = time.monotonic()
    victims[-1].send_signal(signal.SIGKILL)
    seconds, lost = sweep.recovery(since)
    printed = sweep.succeeds()
    assert sweep.record.attempts == 1
    sweep.expect_whole_curves()
    assert f"step {sweep.steps:,}" in printed
    assert 0 < lost <= sweep.save_every + LOG_EVERY
    if count == 1:
        whole = Watched(ProjectFolder(tmp_path / "never-cut"), steps=1500, every=500, save_every=100)
        whole.succeeds()
        for metric in ("train/loss", "eval/fd_nfe1"):
            assert sweep.curve(metric) == whole.curve(metric)
    outcome(
        Outcome(
            f"kill -9 of 1 of {count} worker(s)", "state `restarting`, then `running`; exit 0", seconds, lost
        )
    )


def test_a_killed_driver_goes_on_with_the_same_command(tmp_path: Path, outcome: Note) -> None:
    sweep = Watched(ProjectFolder(tmp_path / "runs"), steps=1500, every=500, save_every=100)
    sweep.trains()
    everyone = psutil.Process(sweep.process.pid).children(recursive=True)
    sweep.process.send_signal(signal.SIGKILL)
    psutil.wait_procs(everyone, timeout=60)
    sweep.process.communicate()
    since = time.monotonic()
    again = Watched(sweep.storage, steps=1500, every=500, save_every=100)
    seconds, lost = again.recovery(since)
    printed = again.succeeds()
    assert "going on with sweep" in printed
    again.expect_whole_curves()
    assert lost <= sweep.save_every + LOG_EVERY
    outcome(
        Outcome(
            "kill -9 of the driver, same command again", '"going on with sweep ..."; exit 0', seconds, lost
        )
    )


SIGNALS = [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]


@pytest.mark.parametrize(("number", "expected"), SIGNALS)
def test_a_signal_to_the_process_group_saves_and_leaves_no_process(
    tmp_path: Path, outcome: Note, number: signal.Signals, expected: int
) -> None:
    # So far between checkpoints that a request to stop is answered between two of them.
    sweep = Watched(ProjectFolder(tmp_path / "runs"), steps=9000, every=3000, save_every=1000, group=True)
    sweep.trains(checkpoints=1)
    everyone = psutil.Process(sweep.process.pid).children(recursive=True)
    os.killpg(sweep.process.pid, number)
    since = time.monotonic()
    code, _, said = sweep.end(60)
    seconds = time.monotonic() - since
    assert code == expected, said
    assert "Traceback" not in said
    saved = sweep.checkpoint_steps[-1]
    assert sweep.status["state"] == "stopped"
    assert saved == sweep.status["step"]
    assert saved % sweep.save_every
    assert sweep.run_states() == {"KILLED"}
    _, alive = psutil.wait_procs(everyone, timeout=10)
    assert alive == []
    outcome(
        Outcome(
            f"{number.name} to the process group",
            f"saved and ended in {seconds:.0f} s, runs KILLED, exit {code}, no process left",
            None,
            0,
        )
    )


def test_sigterm_saves_marks_the_runs_and_exits_143(tmp_path: Path, outcome: Note) -> None:
    sweep = Watched(ProjectFolder(tmp_path / "runs"), steps=9000, every=3000, save_every=1000)
    sweep.trains(checkpoints=1)
    sweep.process.send_signal(signal.SIGTERM)
    since = time.monotonic()
    code, _, message = sweep.end(60)
    seconds = time.monotonic() - since
    assert code == 143
    assert "trials finish their step and save" in message
    saved = sweep.checkpoint_steps[-1]
    assert sweep.status["state"] == "stopped"
    assert saved == sweep.status["step"]
    assert saved % sweep.save_every
    again = Watched(sweep.storage, steps=9000, every=3000, save_every=1000)
    since = time.monotonic()
    _, lost = again.recovery(since)
    assert lost == 0
    again.process.send_signal(signal.SIGTERM)
    assert again.end(60)[0] == 143
    outcome(
        Outcome(
            "SIGTERM",
            f"saved and ended in {seconds:.0f} s, runs KILLED, exit 143; the same command goes on",
            None,
            lost,
        )
    )


def removed_node(
    cluster: Any, tmp_path: Path, nodes: int, resources: str | None = None
) -> tuple[Watched, float]:
    """A sweep that trains on a cluster of so many nodes, and the moment at which a node that trains was removed."""
    added = [cluster.add_node(num_cpus=2) for _ in range(nodes)]
    sweep = Watched(
        ProjectFolder(tmp_path / "runs"),
        resources or WORKERS_ON_NODES,
        steps=1500,
        every=500,
        save_every=100,
        address=str(cluster.address),
    )
    sweep.trains()
    since = time.monotonic()
    cluster.remove_node(_busy(added), allow_graceful=False)
    return sweep, since


# Nodes of 2 CPU have room for one such worker each, and for the function that drives the trial.
WORKERS_ON_NODES = "resources={workers: 2, cpus_per_worker: 1.5, max_failures: 3, concurrent_trials: 1}"


def test_a_removed_node_is_replaced_by_a_spare_one(cluster: Any, tmp_path: Path, outcome: Note) -> None:
    sweep, since = removed_node(cluster, tmp_path, 3)
    seconds, lost = sweep.recovery(since)
    sweep.succeeds()
    sweep.expect_whole_curves()
    assert lost <= sweep.save_every + LOG_EVERY
    outcome(
        Outcome("node removed, another one free", "state `restarting`, then `running`; exit 0", seconds, lost)
    )


def drain(address: str, node: str, seconds: int) -> None:
    """Tell Ray that it will lose a node, as a cloud's notice of preemption does."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", address]
    command += ["--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "a test", "--deadline-remaining-seconds", str(seconds)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def test_trials_save_before_a_node_that_is_drained_is_lost(
    cluster: Any, tmp_path: Path, outcome: Note
) -> None:
    added = [cluster.add_node(num_cpus=2) for _ in range(3)]
    sweep = Watched(
        ProjectFolder(tmp_path / "runs"),
        WORKERS_ON_NODES,
        steps=3000,
        every=1000,
        save_every=500,
        address=str(cluster.address),
    )
    sweep.trains(checkpoints=1)
    node = _busy(added)
    drain(str(cluster.address), node.node_id, 300)
    sweep.wait_for(lambda: any(step % sweep.save_every for step in sweep.checkpoint_steps), 60)
    assert "asked to save: a machine is to be lost" in sweep.log
    since = time.monotonic()
    cluster.remove_node(node, allow_graceful=False)
    seconds, lost = sweep.recovery(since)
    output = sweep.succeeds()
    sweep.expect_whole_curves()
    assert "1 node(s) of the cluster are to be lost: running trials save" in output
    outcome(
        Outcome(
            "node drained (preemption notice), then removed, another one free",
            '"node(s) of the cluster are to be lost: running trials save"; exit 0',
            seconds,
            lost,
        )
    )


def test_with_fewer_nodes_an_elastic_trial_goes_on_at_the_same_batch(
    cluster: Any, tmp_path: Path, outcome: Note
) -> None:
    elastic = WORKERS_ON_NODES.replace("workers: 2", "workers: 2, min_workers: 1")
    sweep, since = removed_node(cluster, tmp_path, 2, elastic)
    seconds, lost = sweep.recovery(since)
    sweep.succeeds()
    sweep.expect_whole_curves()
    assert "going on with 1 worker(s)" in sweep.log
    assert lost <= sweep.save_every + LOG_EVERY
    last = sweep.last_position
    assert (last.step, last.images) == (1500, 1500 * BATCH)
    outcome(
        Outcome(
            "node removed, none free, min_workers 1",
            '"going on with 1 worker(s)", same global batch; exit 0',
            seconds,
            lost,
        )
    )


def test_a_trial_fails_when_no_node_comes_within_wait_minutes(
    cluster: Any, tmp_path: Path, outcome: Note
) -> None:
    """Its failure names the time that was waited."""
    impatient = WORKERS_ON_NODES.replace("workers: 2", "workers: 2, wait_minutes: 1.5")
    sweep, since = removed_node(cluster, tmp_path, 2, impatient)
    message = sweep.fails()
    seconds = time.monotonic() - since
    assert "no machine for its 2 worker(s) came within 1.5 min (resources.wait_minutes)" in message
    assert sweep.status["state"] == "failed"
    outcome(
        Outcome(
            "node removed, none comes within wait_minutes",
            f"exit 1 and one sentence after {seconds:.0f} s, for wait_minutes: 1.5",
            None,
            None,
        )
    )


def test_a_trial_that_waits_for_a_node_can_be_stopped(cluster: Any, tmp_path: Path) -> None:
    sweep, _ = removed_node(cluster, tmp_path, 2)
    sweep.wait_for(lambda: time.time() - sweep.status["updated"] > 10)
    request_stop(sweep.storage, sweep.record.id)
    code, _, message = sweep.end(90)
    assert code == 143, message
    assert "asked to stop while it waited for machines" in sweep.log
    assert sweep.status["state"] == "stopped"


def test_the_autoscaling_coordinator_outlasts_its_node(cluster: Any) -> None:
    import ray

    def node_of(actor: Any) -> str:
        del actor
        return str(ray.get_runtime_context().get_node_id())

    nodes = {
        node.node_id: node for node in (cluster.add_node(num_cpus=2, resources={"node": 1}) for _ in range(2))
    }
    ray.init(address=str(cluster.address), namespace="soflow", log_to_driver=False)
    try:
        home, known = "", None
        while home not in nodes:
            # The head is where the preferred node cannot take it at once, and cannot be removed.
            if known is not None:
                ray.kill(known)
            ray.get(
                ray.remote(start_autoscaling_coordinator).options(num_cpus=0, resources={"node": 1}).remote()
            )
            known = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
            home = ray.get(known.__ray_call__.remote(node_of), timeout=60)
        cluster.remove_node(nodes[home], allow_graceful=False)
        deadline = time.monotonic() + 90
        while ray.get(known.__ray_call__.remote(node_of), timeout=90) == home:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    finally:
        ray.shutdown()


def _busy(nodes: list[Any]) -> Any:
    """A node on which a worker trains, and that is not the one the command is connected to."""
    for node in nodes:
        raylet = node.all_processes["raylet"][0].process
        held = " ".join(
            part for child in psutil.Process(raylet.pid).children(recursive=True) for part in child.cmdline()
        )
        if "RayTrainWorker" in held and "ProgressActor" not in held:
            return node
    raise AssertionError("no node trains")
