"""`soflowctl ui` serves the project folder's MLflow on loopback and prints the page of the newest sweep."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.tuning.record import SweepRecord
from tests.support.commands import command, environment
from tests.support.scored_sweep import empty_store


@pytest.fixture
def page(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str, str]]:
    """Process id of the command, the page it printed, and the id of the run the page should show."""
    storage = ProjectFolder(tmp_path / "runs")
    storage.root.mkdir()
    shutil.copy(empty_store(tmp_path_factory), storage.root)
    tracking = Tracking.open(storage.tracking_uri, "digits", storage)
    parent = tracking.open_run("digits-1", "digits-1", params={}, tags={})
    tracking.open_run("digits-1", "trial-00", params={}, tags={}, trial="trial-00", parent=parent)
    record = SweepRecord("digits-1", "digits", "", {}, [], "eval/fd_nfe1", "min", run=parent)
    record.experiment_id, record.tracking_uri = tracking.experiment_id, storage.tracking_uri
    record.save(storage)
    arguments = command("ui", "--storage", str(storage.root), "--port", "0", "--no-open")
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("MLflow on http://127.0.0.1:")
        yield process.pid, process.stdout.readline().strip(), parent
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 143
        assert psutil.wait_procs(family, timeout=10)[1] == []


def post(url: str, content: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        result: dict[str, object] = json.loads(answer.read())
    return result


def test_the_page_shows_the_newest_sweep_on_loopback_alone(
    page: tuple[int, str, str],
) -> None:
    pid, url, parent = page
    address, fragment = url.split("/#")
    with urllib.request.urlopen(address, timeout=20) as answer:
        assert "<title>MLflow</title>" in answer.read().decode()
    path, query = fragment.split("?")
    parameters = urllib.parse.parse_qs(query)
    assert parameters["orderByKey"] == ["metrics.`eval/fd_nfe1`"]
    assert parent in parameters["searchFilter"][0]
    search = {"experiment_ids": [path.split("/")[2]], "filter": parameters["searchFilter"][0]}
    found = post(f"{address}/api/2.0/mlflow/runs/search", search)["runs"]
    assert isinstance(found, list)
    assert [run["info"]["run_name"] for run in found] == ["trial-00"]
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    listening = {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
