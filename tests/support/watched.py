"""A small sweep as a user starts it, watched from outside while things are done to it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from soflow_pipelines.storage.files import read_json
from soflow_platform.storage.checkpoints import CheckpointState
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import SweepRecord, all_records

ROOT = Path(__file__).parents[2]
LOG_EVERY = 10
BATCH = 32


@dataclass(frozen=True)
class Outcome:
    """What a fault came to."""

    fault: str
    seen: str
    seconds: float | None
    """From the fault to the next finished step."""
    lost: int | None
    """Steps that were trained twice."""

    def row(self) -> str:
        """A row of the table."""
        seconds = "-" if self.seconds is None else f"{self.seconds:.0f} s"
        return f"| {self.fault} | {self.seen} | {seconds} | {'-' if self.lost is None else self.lost} |"


RUNNING: list[subprocess.Popen[str]] = []
"""Commands that were started; a test that fails leaves its own behind."""


class Watched:
    """One running command; a sweep of one trial on the digits."""

    def __init__(
        self, storage: ProjectFolder, *settings: str, steps: int = 400, every: int = 50, save_every: int | None = None,
        address: str | None = None, environment: Mapping[str, str] | None = None, group: bool = False,
    ) -> None:  # fmt: skip
        self.storage, self.steps, self.every, self.save_every = storage, steps, every, save_every or every
        own = [
            "network={patch: 4, hidden: 32, depth: 2, heads: 2}",
            f"training={{steps: {steps}, batch: {BATCH}, ema: [0.9], log_every: {LOG_EVERY}}}",
            f"evaluation={{every: {every}, samples: 64, nfe: [1], features: pooled, grid: 2}}",
            "search={space: {}, metric: eval/fd_nfe1}",
            "resources.cpus_per_worker=0.5",
            f"training.checkpoint_every={self.save_every}",
            *settings,
        ]
        flags = [part for setting in own for part in ("--set", setting)]
        flags += ["--address", address] if address else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "soflow_platform.cli.main", "run", "digits", "--storage", str(storage.root), *flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # The command leads a process group, as under a shell or a batch system.
            start_new_session=group,
        )  # fmt: skip

        RUNNING.append(self.process)

    @property
    def record(self) -> SweepRecord:
        (record,) = all_records(self.storage)
        return record

    @property
    def folder(self) -> Path:
        return self.storage.trial(self.record.id, self.record.trials[0].name)

    @property
    def checkpoint_steps(self) -> list[int]:
        if not all_records(self.storage):
            return []
        store = self.record.checkpoints(self.storage, self.record.trials[0].name)
        return [checkpoint.state.step for checkpoint in store.published()]

    @property
    def last_position(self) -> CheckpointState:
        """Where the newest checkpoint of a trial stands that keeps them in the project folder."""
        store = self.record.checkpoints(self.storage, self.record.trials[0].name)
        return store.published()[-1].state

    @property
    def status(self) -> dict[str, Any]:
        if not all_records(self.storage):
            return {"step": 0, "state": "starting"}
        return read_json(self.folder / "status.json") or {"step": 0, "state": "starting"}

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text() if path.exists() else ""

    @property
    def workers(self) -> list[psutil.Process]:
        """The processes that train; their names say so. A trial of one worker trains in Tune's trial actor."""
        return self.processes("ray::RayTrainWorker") or self.processes("ray::TrialActor")

    def processes(self, *names: str) -> list[psutil.Process]:
        """Those below the command with one of these in their command lines."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                if any(name in line for name in names):
                    found.append(process)
        return found

    def wait_for(self, condition: Callable[[], Any], seconds: float = 150) -> None:
        """AssertionError where the command ends or the time does first."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, f"it did not come: {self.status}\n{self.log}"
            time.sleep(0.05)

    def trains(self, checkpoints: int = 2) -> int:
        """Wait until it has saved a few times and its latest status has a step beyond the last checkpoint. Returns that step."""
        self.wait_for(lambda: len(self.checkpoint_steps) >= checkpoints)
        status = self.status

        def is_beyond() -> bool:
            nonlocal status
            before, status = status, self.status
            beyond = status["step"] - self.checkpoint_steps[-1]
            if self.save_every < self.every and beyond > 0.8 * self.save_every:
                # The next checkpoint would come before the fault.
                return False
            return status["updated"] > before["updated"] and beyond > 5

        self.wait_for(is_beyond)
        return int(status["step"])

    def recovery(self, since: float) -> tuple[float, int]:
        """(seconds since a fault until training went on, steps trained twice): from the trial's status at the fault, the points
        that it logged, and the line in the log with which it resumed."""
        pattern = r"step (\d+)  going on"
        resumes = len(re.findall(pattern, self.log))
        reached = max([self.status["reached"], *self.curve("train/loss")])
        self.wait_for(lambda: len(re.findall(pattern, self.log)) > resumes)
        from_step = int(re.findall(pattern, self.log)[-1])
        self.wait_for(lambda: self.status["step"] > from_step or self.process.poll() is not None)
        return time.monotonic() - since, max(0, reached - from_step)

    def curve(self, metric: str) -> dict[int, float]:
        """A curve of the trial's run in the sweep's own SQLite store."""
        tracking = Tracking(TrackingStore(self.storage.tracking_uri), self.record.experiment_id or "")
        (run,) = tracking.children(self.record.run or "")
        history = tracking.client.get_metric_history(run.info.run_id, metric)
        return {m.step: m.value for m in history}

    def succeeds(self, seconds: float = 240) -> str:
        """Wait for the command, which must exit with 0 and no traceback -> what it printed."""
        code, printed, message = self.end(seconds)
        assert code == 0, message
        assert "Traceback" not in message
        return printed

    def fails(self, seconds: float = 240) -> str:
        """Wait for the command, which must exit with 1 and no traceback -> its message."""
        code, _, message = self.end(seconds)
        assert code == 1, message
        assert "Traceback" not in message
        return message

    def run_states(self) -> set[str]:
        """Of the sweep's run in MLflow and its trials' runs."""
        tracking = Tracking(TrackingStore(self.storage.tracking_uri), self.record.experiment_id or "")
        parent = tracking.client.get_run(self.record.run or "")
        return {run.info.status for run in (parent, *tracking.children(self.record.run or ""))}

    def end(self, seconds: float = 240) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        try:
            printed, message = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            raise AssertionError(f"it did not end: {self.status}\n{self.log}") from None
        return self.process.returncode, printed, message

    def expect_whole_curves(
        self, status: str = "FINISHED", uri: str | None = None, last: int | None = None
    ) -> None:
        """Every point of every curve is there once, under one run."""
        uri, last = uri or self.storage.tracking_uri, last or self.steps
        tracking = Tracking(TrackingStore(uri), self.record.experiment_id or "")
        (run,) = tracking.children(self.record.run or "")
        assert run.info.status == status
        client = TrackingStore(uri).client
        points = {
            "train/loss": [1, *range(LOG_EVERY, last + 1, LOG_EVERY)],
            "eval/fd_nfe1": list(range(self.every, last + 1, self.every)),
        }
        for metric, expected in points.items():
            found = [m.step for m in client.get_metric_history(run.info.run_id, metric)]
            assert found == expected, metric
