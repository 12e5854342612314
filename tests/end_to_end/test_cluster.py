"""The same sweep on a Ray cluster that runs already, of several nodes."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from soflow_platform.cluster.connection import connected
from soflow_platform.storage.code_digest import running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.progress import start_progress_actor
from soflow_platform.tuning.record import all_records
from tests.support.commands import REDUCED, ROOT, Run
from tests.support.ray_nodes import ray_nodes

ONE_TRIAL = ["--set", "search.space={objective.weight_power: [1.0]}", "--set", "resources.workers=2"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A head without work of its own and two nodes of one CPU each, whose own soflow cannot be imported."""
    with ray_nodes(tmp_path_factory.mktemp("nodes") / "code") as address:
        yield address


def environment_of_the_cluster(soflowctl: Run, *arguments: str) -> dict[str, dict[str, str]]:
    """The checks of `soflowctl doctor --json`, by name, and its exit code."""
    done = soflowctl("doctor", *arguments, "--json")
    checks = {check["check"]: check for check in json.loads(done.stdout)}
    assert done.returncode == (1 if any(c["state"] == "wrong" for c in checks.values()) else 0), done.stderr
    return checks


@pytest.mark.slow
def test_doctor_asks_every_node_and_names_the_one_that_sees_another_folder(
    soflowctl: Run, address: str, tmp_path: Path
) -> None:
    storage = ["--storage", str(tmp_path / "runs"), "--address", address]
    checks = environment_of_the_cluster(soflowctl, *storage)
    assert [name for name, check in checks.items() if check["state"] != "ok"] == []
    assert checks["ray"]["text"].endswith(f"3 nodes answer at {address}")
    assert checks["storage"]["text"] == f"{tmp_path / 'runs'}, written by 3 node(s)"
    assert checks["between nodes"]["text"].startswith("Gloo over 2 nodes, ")
    assert checks["code"]["text"] == running_code().digest
    assert not (tmp_path / "runs").exists()

    checks = environment_of_the_cluster(soflowctl, "xl2", *storage, "--tracking", "http://127.0.0.1:9")
    assert {name for name, check in checks.items() if check["state"] == "wrong"} >= {"mlflow", "data"}
    assert "http://127.0.0.1:9 does not answer" in checks["mlflow"]["text"]
    assert "soflowctl data prepare" in f"{checks['data']['text']} {checks['data']['mend']}"


@pytest.mark.slow
def test_a_nodes_metrics_port_has_the_trials_numbers(address: str) -> None:
    import ray

    with connected(address):
        actor = start_progress_actor("digits-1", exported=True)
        changes = {
            "state": TrialState.RUNNING,
            "images_per_second": 12.5,
            "loss": 0.25,
            "step": 7,
            "eta_seconds": 60.0,
        }
        ray.get(actor.update.remote("trial-00", changes))
        ray.get(actor.update.remote("trial-00", {"state": TrialState.RESTARTING}))
        ray.get(actor.update.remote("trial-00", changes))
        wanted = {"images_per_second": "12.5", "loss": "0.25", "step": "7.0", "restarts_total": "1.0"}
        ports = {node["MetricsExportPort"]: node["NodeManagerAddress"] for node in ray.nodes()}
        until = time.monotonic() + 90
        found: dict[str, str] = {}
        while found != wanted and time.monotonic() < until:
            time.sleep(1)
            lines = [line for port, host in ports.items() for line in metrics(host, port)]
            found = {
                name: line.rsplit(" ", 1)[1]
                for name in wanted
                for line in lines
                if line.startswith(f"ray_soflow_{name}{{") and 'trial="trial-00"' in line
            }
        ray.kill(actor)
    assert found == wanted
    dashboard = (ROOT / "infra" / "grafana" / "soflow.json").read_text(encoding="utf-8")
    shown = set(re.findall(r"\bray_\w+", dashboard)) - {"ray_node_gpus_utilization", "ray_node_gram_used"}
    exported = {re.split(r"[{ ]", line)[0] for line in lines}
    assert shown - exported == set()


def metrics(host: str, port: int) -> list[str]:
    """Lines that a node's metrics port gives to Prometheus."""
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=20) as answer:
        return str(answer.read().decode()).splitlines()


@pytest.mark.slow
def test_two_workers_on_two_nodes_train_one_network(soflowctl: Run, address: str, tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    arguments = [
        "run",
        "digits",
        "--storage",
        str(storage.root),
        *REDUCED,
        *ONE_TRIAL,
        "--set",
        "resources.cpus_per_worker=0.5",
    ]
    done = soflowctl(*arguments, "--address", address)
    assert done.returncode == 0, done.stderr
    assert "on 2 CPU, 0 GPU, 3 node(s)" in done.stdout
    (record,) = all_records(storage)
    # The nodes' own code raises where it is imported: this is the command's.
    (trial,) = record.trials
    assert {each.state.code for each in record.checkpoints(storage, trial.name).published()} == {
        running_code().digest
    }
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_submitted_sweep_runs_without_a_terminal_and_is_found_through_its_folder(
    soflowctl: Run, address: str, tmp_path: Path
) -> None:
    place = ["--storage", str(tmp_path / "runs")]
    settings = [*REDUCED, "--set", "search.space={objective.weight_power: [0.5, 1.0]}", "--set", "name=away"]
    done = soflowctl(
        "run", str(ROOT / "sweeps" / "digits.yaml"), *settings, *place, "--address", address, "--detach"
    )
    assert done.returncode == 0, done.stderr
    (record,) = all_records(ProjectFolder(tmp_path / "runs"))
    assert record.attempts == 0
    assert f"soflowctl attach {record.id}" in done.stdout
    again = soflowctl(
        "run", str(ROOT / "sweeps" / "digits.yaml"), *settings, *place, "--address", address, "--detach"
    )
    assert again.returncode == 2
    assert "is running already" in again.stderr

    # It needs no address, and no Ray.
    attached = soflowctl("attach", record.id, *place)
    assert attached.returncode == 0, attached.stderr
    assert "best trial  trial-0" in attached.stdout
    assert "is job raysubmit_" in attached.stderr
    states = json.loads(soflowctl("status", record.id, *place, "--json").stdout)
    assert [state["state"] for state in states] == ["finished", "finished"]
    (finished,) = all_records(ProjectFolder(tmp_path / "runs"))
    assert finished.finished
    assert finished.code == [running_code().digest]
    assert soflowctl("attach", record.id, *place).stdout == attached.stdout
