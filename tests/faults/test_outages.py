"""Disks that fill, servers that go away and come back, data that is broken, machines that are slow."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_platform.storage.project import ProjectFolder
from tests.support.object_store import Wire, free_port, serving, set_credentials, uri
from tests.support.small_disks import mounted
from tests.support.watched import BATCH, Outcome, Watched

pytestmark = pytest.mark.faults
Note = Callable[[Outcome], None]
OUTAGE_SECONDS = 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB of its own."""
    with mounted(tmp_path / "disk", mebibytes=24) as folder:
        yield folder


def fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))


def test_a_disk_that_is_full_while_saving_delays_the_checkpoint(
    tmp_path: Path, small_disk: Path, outcome: Note
) -> None:
    sweep = Watched(ProjectFolder(tmp_path / "runs"), f"training.checkpoints={small_disk}", steps=1200)
    sweep.trains()
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        fill(ballast)
    since = time.monotonic()
    sweep.wait_for(lambda: "trying again" in sweep.log)
    stood = sweep.checkpoint_steps[-1]
    time.sleep(5)
    assert sweep.checkpoint_steps[-1] == stood
    ballast.unlink()
    sweep.wait_for(lambda: sweep.checkpoint_steps[-1] > stood)
    seconds = time.monotonic() - since
    printed = " ".join(sweep.succeeds().split())
    assert "no space" in sweep.log.lower()
    assert "no space is left on the disk" in printed
    assert printed.index("; trying again for") < printed.index("saves and logs again")
    sweep.expect_whole_curves()
    outcome(
        Outcome(
            "disk full while saving, freed again",
            'log and screen: "saving ... failed (... no space ...); trying again for 10 min"; exit 0',
            seconds,
            0,
        )
    )


def test_a_disk_that_stays_full_fails_the_trial_at_its_end(
    tmp_path: Path, small_disk: Path, outcome: Note
) -> None:
    (small_disk / "ballast").write_bytes(bytes(23 << 20))
    settings = [f"training.checkpoints={small_disk}", "training.patience_minutes=0.05"]
    sweep = Watched(ProjectFolder(tmp_path / "runs"), *settings, steps=100, every=100)
    message = sweep.fails()
    assert "saving the checkpoint of step 100" in message
    assert "the same command" in message
    (small_disk / "ballast").unlink()
    again = Watched(sweep.storage, *settings, steps=100, every=100)
    again.succeeds()
    outcome(
        Outcome(
            "disk full to the end", "exit 1, one sentence; after freeing, the same command goes on", None, 100
        )
    )


def test_s3_gone_for_a_minute_costs_no_step(
    tmp_path: Path, outcome: Note, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_credentials(monkeypatch)
    with serving(tmp_path / "s3", "runs") as server, contextlib.closing(Wire(server.port)) as wire:
        place = uri(wire.port, "runs/checkpoints")
        sweep = Watched(ProjectFolder(tmp_path / "runs"), f"training.checkpoints='{place}'", steps=1200)
        sweep.trains()
        since, before = time.monotonic(), sweep.status["step"]
        wire.cut_after = 0
        time.sleep(OUTAGE_SECONDS)
        during = sweep.status["step"]
        wire.cut_after = None
        sweep.wait_for(lambda: "succeeded after" in sweep.log)
        seconds = time.monotonic() - since
        sweep.succeeds()
        sweep.expect_whole_curves()
        assert during > before
        assert "going on" not in sweep.log
    outcome(
        Outcome(
            "S3 gone for 60 s",
            'log: "saving ... failed (...); trying again", "... succeeded after ..."; exit 0',
            seconds,
            0,
        )
    )


class TrackingServer:
    """`mlflow server` on loopback over SQLite; may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        store, artifacts = f"sqlite:///{self.folder}/mlflow.db", str(self.folder / "artifacts")
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
        command += ["--artifacts-destination", artifacts, "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 90
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def kill(self) -> None:
        everyone = [self.process, *psutil.Process(self.process.pid).children(recursive=True)]
        for process in everyone:
            process.kill()
        self.process.wait()

    def _answers(self) -> bool:
        import urllib.request

        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def test_a_tracking_server_gone_for_a_minute_costs_no_point_of_a_curve(tmp_path: Path, outcome: Note) -> None:
    server = TrackingServer(tmp_path)
    server.start()
    try:
        sweep = Watched(ProjectFolder(tmp_path / "runs"), f"tracking.uri={server.uri}", steps=1200)
        sweep.trains()
        before, since = sweep.status["step"], time.monotonic()
        server.kill()
        time.sleep(OUTAGE_SECONDS)
        during = sweep.status["step"]
        server.start()
        sweep.wait_for(lambda: "succeeded after" in sweep.log)
        seconds = time.monotonic() - since
        sweep.succeeds()
        assert during > before
        sweep.expect_whole_curves(uri=server.uri)
    finally:
        server.kill()
    outcome(
        Outcome(
            "MLflow's server gone for 60 s",
            'log: "logging ... failed (...); trying again"; training goes on; exit 0',
            seconds,
            0,
        )
    )


def test_a_loss_that_is_not_finite_fails_the_trial_with_step_term_and_rank(
    tmp_path: Path, outcome: Note
) -> None:
    settings = ["optimizer.lr=1.0e+30", "resources.workers=2"]
    sweep = Watched(ProjectFolder(tmp_path / "runs"), *settings, steps=200, every=1)
    message = sweep.fails()
    assert " is not finite at step " in message
    assert " on rank " in message
    assert "the update was not made" in message
    outcome(
        Outcome(
            "loss not finite",
            "exit 1, one sentence with term, step and rank; older checkpoints kept",
            None,
            None,
        )
    )


def test_a_loss_that_breaks_on_one_rank_stops_all_and_names_it(tmp_path: Path, outcome: Note) -> None:
    folder, odd = tmp_path / "set", 333
    # All samples are 0 but one, which is finite, and whose square is not.
    moments = np.zeros((640, 8, 8, 8), np.float16)
    moments[odd, :4] = np.finfo(np.float16).max
    info = DatasetInfo(kind="latents", shape=(4, 8, 8), dtype="float16", classes=2, scaling=3e33)
    write_shards([Sample(f"{i:03d}", m, int(i == odd)) for i, m in enumerate(moments)], folder, info)
    step, rank = _meets(folder)
    settings = [f"data.source={folder}", "resources.workers=2", "training.checkpoint_every=1"]
    sweep = Watched(ProjectFolder(tmp_path / "runs"), *settings, steps=20, every=20)
    message = sweep.fails()
    assert f" is not finite at step {step} on rank {rank}: the update was not made" in message
    assert max(sweep.checkpoint_steps, default=0) == step - 1
    outcome(
        Outcome(
            "one rank's batch breaks its loss",
            "exit 1, one sentence with term, step and rank; older checkpoints kept",
            None,
            None,
        )
    )


def _meets(folder: Path) -> tuple[int, int]:
    """(step, rank) at which the sample of label 1 is read by two ranks."""
    for rank in range(2):
        with ShardLoader(folder, BATCH, rank, 2, seed=0) as loader:
            for step in range(1, 21):
                if bool((next(loader).labels == 1).any()):
                    return step, rank
    raise AssertionError("it is in no batch of the first epoch")


def test_a_full_project_folder_only_delays_until_there_is_room(small_disk: Path, outcome: Note) -> None:
    sweep = Watched(ProjectFolder(small_disk / "runs"), steps=1200)
    sweep.trains()
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        fill(ballast)
    since, before = time.monotonic(), sweep.checkpoint_steps[-1]
    time.sleep(15)
    ballast.unlink()
    sweep.wait_for(lambda: sweep.checkpoint_steps[-1] > before)
    seconds = time.monotonic() - since
    printed = " ".join(sweep.succeeds().split())
    assert printed.index("; trying again for") < printed.index("saves and logs again")
    sweep.expect_whole_curves()
    outcome(
        Outcome(
            "project folder's disk full for 15 s (SQLite, log, checkpoints)",
            "training goes on, the screen says so; no point of a curve missing; exit 0",
            seconds,
            0,
        )
    )


def test_a_slow_rank_is_named(tmp_path: Path, outcome: Note) -> None:
    sweep = Watched(ProjectFolder(tmp_path / "runs"), "resources.workers=2", steps=2000, every=500)
    sweep.wait_for(lambda: sweep.status["step"] > 20)
    slowed, done = sweep.workers[0], threading.Event()

    def hold_back() -> None:
        while not done.wait(0.004):
            slowed.send_signal(signal.SIGSTOP)
            time.sleep(0.02)
            slowed.send_signal(signal.SIGCONT)

    thread = threading.Thread(target=hold_back)
    thread.start()
    try:
        sweep.wait_for(lambda: "times as long as the others" in sweep.log, 60)
    finally:
        done.set()
        thread.join()
    sweep.succeeds()
    sweep.expect_whole_curves()
    outcome(
        Outcome(
            "one rank slower than the rest",
            'log: "rank 1 takes 2.4 times as long as the others for a forward pass"',
            None,
            0,
        )
    )
