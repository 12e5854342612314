"""soflowctl ui."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from typing import IO

from soflow_platform.cli.terminal import storage_flag
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.project import ProjectFolder, find_project
from soflow_platform.tracking.links import sweep_page
from soflow_platform.tuning.record import all_records

START_SECONDS = 60.0


def ui_command(storage: str | None, port: int, browser: bool) -> None:
    """Serve the project folder's MLflow on loopback until interrupted, and show the newest sweep's page."""
    project = find_project(storage)
    if not (project.root / "mlflow.db").is_file():
        raise UserError(
            f"there are no runs under {project.root}; start some with `soflowctl run digits{storage_flag(project)}`."
        )
    port = _free_port(port)
    address = f"http://127.0.0.1:{port}"
    # A file and no pipe: nobody reads a pipe, and a server whose messages fill it stands still.
    with tempfile.TemporaryFile() as messages:
        server = subprocess.Popen(
            _command(project, port), env=_environment(), stdout=subprocess.DEVNULL, stderr=messages
        )
        # By default SIGTERM would end this command without `finally`, and leave the server running.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            _wait_until_healthy(server, address, messages)
            page = _newest_page(project, address)
            print(f"MLflow on {address} (Ctrl-C stops it)\n{page}", flush=True)
            if browser:
                webbrowser.open(page)
            server.wait()
        finally:
            server.terminate()
            server.wait()


def _command(project: ProjectFolder, port: int) -> list[str]:
    options = {
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
        "--backend-store-uri": project.tracking_uri,
        "--default-artifact-root": project.artifacts.as_uri(),
    }
    pairs = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "mlflow", "server", *pairs, "--no-serve-artifacts"]


def _environment() -> dict[str, str]:
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**os.environ, **quiet}


def _free_port(port: int) -> int:
    """The port given, or another one where that is taken."""
    for candidate in (port, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise UserError("no free port on 127.0.0.1; pass --port.")


def _wait_until_healthy(server: subprocess.Popen[bytes], address: str, messages: IO[bytes]) -> None:
    """Raises JobError where the server ends, or does not answer within START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            messages.seek(0)
            text = messages.read().decode(errors="replace").strip()
            raise JobError(
                f"the MLflow server ended at once: {text.splitlines()[-1] if text else 'without a message'}"
            )
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise JobError(f"the MLflow server did not answer on {address} within {START_SECONDS:g} s.")


def _newest_page(project: ProjectFolder, address: str) -> str:
    """URL of the page with the trials of the newest sweep that has a run in MLflow."""
    for record in all_records(project):
        if record.run and record.experiment_id:
            return sweep_page(record.experiment_id, record.run, record.metric, address, record.view)
    return f"{address}/#/experiments"
