"""`soflowctl ui` serves as long as it is asked to, whatever its server says meanwhile."""

from __future__ import annotations

import signal
import sys

import pytest

from soflow_platform.cli import ui
from soflow_platform.errors import JobError
from soflow_platform.storage.project import ProjectFolder

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

sys.stderr.write("a message\\n" * 20_000)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).handle_request()
"""
"""Says more than a pipe holds, then answers once."""


@pytest.fixture
def project(storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch) -> ProjectFolder:
    storage.root.mkdir()
    (storage.root / "mlflow.db").touch()
    monkeypatch.setattr(ui, "START_SECONDS", 20.0)
    # The command sets a handler of its own for as long as its process lives.
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return storage


def test_a_server_that_says_much_is_waited_for(
    project: ProjectFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ui, "_command", lambda _, port: [sys.executable, "-c", SERVER, str(port)])
    ui.ui_command(str(project.root), 0, browser=False)
    assert "MLflow on http://127.0.0.1:" in capsys.readouterr().out


def test_a_server_that_ends_at_once_has_its_last_line_in_the_sentence(
    project: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ui, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no database')"])
    with pytest.raises(JobError, match="the MLflow server ended at once: no database"):
        ui.ui_command(str(project.root), 0, browser=False)
