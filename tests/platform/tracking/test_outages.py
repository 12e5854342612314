"""Outages of the tracking server, as against refused requests, by the responses of a real server."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from soflow_platform.cli.main import main
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import JobError, Stopped
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.metric_logger import MetricLogger
from soflow_platform.tracking.outages import is_outage
from soflow_platform.tracking.store import TrackedDataset, Tracking, TrackingStore
from soflow_platform.tuning.display import Display
from soflow_platform.tuning.record import SweepRecord, new_or_resumed_record
from soflow_platform.tuning.sweep import SweepContext, SweepRunner

DIGITS = Path(__file__).parents[3] / "sweeps" / "digits.yaml"
RUN = {
    "info": {"run_id": "a-run", "status": "RUNNING", "artifact_uri": "mlflow-artifacts:/a-run"},
    "data": {},
}


class Answers(ThreadingHTTPServer):
    """Answers every request with `status` while `failures` last, and then as a tracking server with one empty run does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.failures = 200, 0
        self.artifacts_status: int | None = None
        self.logged: list[dict[str, Any]] = []

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Answers

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        if server.artifacts_status is not None and "artifacts" in self.path:
            return self._send(server.artifacts_status, b"the artifact store is away")
        if server.failures:
            server.failures -= 1
            return self._send(server.status, b"not now")
        if self.path.endswith("/log-batch"):
            server.logged += json.loads(body)["metrics"]
        return self._send(200, json.dumps({"run": RUN}).encode())

    do_GET = do_POST = do_PUT = _answer

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Answers]:
    with Answers() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


class RecordingDisplay(Display):
    """Keeps the lines that a sweep reports."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def record(experiment: Experiment) -> SweepRecord:
    return new_or_resumed_record(None, "digits-1", "digits.yaml", experiment, [])


@pytest.mark.parametrize(
    ("status", "away"),
    [(400, False), (401, False), (403, False), (404, False)]
    + [(status, True) for status in (429, 500, 502, 503, 504)],
)
def test_an_answer_is_an_outage_or_a_mistake(server: Answers, status: int, away: bool) -> None:
    server.status, server.failures = status, 100
    with pytest.raises(MlflowException) as caught:
        TrackingStore(server.uri).client.get_run("a-run")
    assert is_outage(caught.value) == away


def opened(server: Answers, log: Callable[[str], None], patience: float) -> MetricLogger:
    logger = MetricLogger(TrackingStore(server.uri), "a-run", log, patience)
    logger.resume()
    return logger


@pytest.mark.parametrize("status", [429, 504])
def test_no_point_is_lost_while_a_server_is_busy_or_slow(server: Answers, status: int) -> None:
    messages: list[str] = []
    log = opened(server, messages.append, 30)
    server.status, server.failures = status, 3
    log.log_metrics(1, {"train/loss": 0.5})
    log.flush()
    assert [(m["key"], m["step"], m["value"]) for m in server.logged] == [("train/loss", 1, 0.5)]
    assert "trying again" in messages[0]
    assert "succeeded after" in messages[1]


def test_a_refused_request_is_no_outage_and_is_reported_at_once(server: Answers) -> None:
    log = opened(server, print, 30)
    server.status, server.failures = 403, 100
    log.log_metrics(1, {"train/loss": 0.5})
    with pytest.raises(JobError, match="logging failed"):
        log.flush()


@pytest.mark.parametrize("status", [503, 403])
def test_a_grid_that_cannot_be_sent_is_reported_and_costs_no_point(server: Answers, status: int) -> None:
    messages: list[str] = []
    log = opened(server, messages.append, 0.5)
    server.artifacts_status = status
    log.log_image(1, "samples/nfe1", np.zeros((8, 8, 3), np.uint8))
    log.log_metrics(1, {"train/loss": 0.5})
    log.flush()
    assert [m["step"] for m in server.logged] == [1]
    assert messages[-1].startswith(f"sending samples/nfe1 of step 1 to {server.uri} failed")
    assert messages[-1].endswith("it is left out")


def test_an_artifact_store_that_is_reached_by_boto_is_away_or_refuses(
    server: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    boto3 = pytest.importorskip(
        "boto3", reason="only for artifacts that are kept in S3 without a server between"
    )
    from boto3.s3.transfer import S3Transfer
    from botocore.config import Config

    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def failure(address: str, status: int) -> BaseException:
        server.status, server.failures = status, 100
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        config = Config(retries={"total_max_attempts": 1}, connect_timeout=2)
        client = boto3.client("s3", endpoint_url=address, config=config, **keys)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            S3Transfer(client).upload_file(__file__, "bucket", "name")
        return caught.value

    assert is_outage(failure(server.uri, 503))
    assert is_outage(failure("http://127.0.0.1:9", 503))
    assert not is_outage(failure(server.uri, 403))


def test_a_sweep_waits_for_its_tracking_server_before_it_closes_its_runs(
    server: Answers, storage: ProjectFolder
) -> None:
    display = RecordingDisplay()
    server.status, server.failures = 504, 3
    experiment, _ = read_experiment(DIGITS)
    with pytest.raises(JobError, match="no trial of sweep digits-1 could be scored"):
        SweepRunner(
            SweepContext(record(experiment), experiment, [], storage, display),
            Tracking(TrackingStore(server.uri), "1"),
        ).conclusion.conclude({})
    assert display.lines[0].startswith("closing the trials' runs failed (")
    assert display.lines[1].startswith("closing the trials' runs succeeded after ")


def test_a_sweep_stopped_during_an_outage_ends_as_stopped(
    tracking: Tracking,
    storage: ProjectFolder,
) -> None:
    """It says which runs could not be marked."""
    display = RecordingDisplay()
    experiment, _ = read_experiment(DIGITS)
    facts = {"data.source": "digits", "data.digest": "0"}
    context = SweepContext(record(experiment), experiment, [], storage, display)

    def stopped() -> None:
        with SweepRunner(context, tracking).tracked_run(facts):
            tracking.store = TrackingStore("http://127.0.0.1:9")
            raise Stopped("it was asked to stop")

    with pytest.raises(Stopped, match="asked to stop"):
        stopped()
    assert display.lines[0].startswith("the sweep's runs could not be marked KILLED and stay RUNNING")


@pytest.mark.parametrize(
    ("status", "code", "kind"), [(504, 1, "failed: the tracking server does not answer: "), (403, 1, "bug")]
)
def test_a_command_distinguishes_an_outage_from_a_bug(
    server: Answers,
    status: int,
    code: int,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server.status, server.failures = status, 100
    monkeypatch.setattr(sys, "argv", ["soflowctl", "promote", "digits", "--tracking", server.uri])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert kind in capfd.readouterr().err


def test_a_run_that_is_not_there_is_no_outage(tracking: Tracking) -> None:
    with pytest.raises(MlflowException) as caught:
        tracking.client.get_run("0" * 32)
    assert not is_outage(caught.value)


def test_a_run_whose_creation_was_cut_is_completed(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or the server gone, between the run and its params: they are written when it is opened again."""

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    data = TrackedDataset("digits", "sha256:" + "0" * 64, "digits")

    def opened_run(seed: int) -> str:
        return tracking.open_run(
            "digits-1", "one", {"seed": seed, "batch": 8}, {}, trial="trial-00", dataset=data
        )

    monkeypatch.setattr(type(tracking.client), "log_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        opened_run(0)
    monkeypatch.undo()
    run = opened_run(0)
    # What it has stays, for a param cannot be changed.
    assert opened_run(1) == run
    found = tracking.client.get_run(run)
    assert found.data.params == {"seed": "0", "batch": "8"}
    assert [each.dataset.name for each in found.inputs.dataset_inputs] == ["digits"]


def test_an_experiment_that_another_command_creates_meanwhile_is_used(
    tracking: Tracking, storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = type(tracking.client).get_experiment_by_name
    before = [None]

    def found(client: Any, name: str) -> Any:
        return before.pop() if before else find(client, name)

    monkeypatch.setattr(type(tracking.client), "get_experiment_by_name", found)
    again = Tracking.open(storage.tracking_uri, "digits", storage)
    assert (again.experiment_id, before) == (tracking.experiment_id, [])


def test_a_sweep_whose_page_cannot_be_kept_leaves_no_run_open(
    tracking: Tracking, storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, _ = read_experiment(DIGITS)
    context = SweepContext(record(experiment), experiment, [], storage, Display())

    def fails(*_: object) -> None:
        raise ConnectionError("the server is away")

    monkeypatch.setattr(Tracking, "share_view", fails)
    runner = SweepRunner(context, tracking)
    with (
        pytest.raises(ConnectionError),
        runner.tracked_run({"data.source": "digits", "data.digest": "0"}),
    ):
        pass
    (run,) = tracking.client.search_runs([tracking.experiment_id])
    assert run.info.status == "FAILED"


def test_the_run_of_a_sweep_shows_the_best_trial_of_its_last_end(tracking: Tracking) -> None:
    """A sweep that grows, or whose failed trials are tried again, may have another best one."""
    run = tracking.open_run("digits-1", "digits-1", {}, {})
    for trial, step, value in (("trial-00", 40, 5.0), ("trial-01", 20, 3.0), ("trial-01", 20, 3.0)):
        tracking.log_result(run, {"trial": trial, "step": step, "metrics": {"eval/fd_nfe1": value}})
    shown = tracking.client.get_run(run).data
    assert (shown.tags["best.trial"], shown.metrics) == ("trial-01", {"eval/fd_nfe1": 3.0})
    assert len(tracking.client.get_metric_history(run, "eval/fd_nfe1")) == 2
