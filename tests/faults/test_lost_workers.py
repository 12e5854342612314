"""A trial whose worker process is killed goes on from its checkpoint, under the same run, with no step logged twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from soflow_platform.checkpoints import published
from soflow_platform.storage import Storage
from soflow_platform.sweep_record import all_records
from soflow_platform.tracking import Tracking, client_for

ROOT = Path(__file__).parents[2]
STEPS = 400
SETTINGS = [
    *("--set", "network={patch: 4, hidden: 32, depth: 2, heads: 2}"),
    *("--set", f"training={{steps: {STEPS}, batch: 32, ema: [0.9], log_every: 10}}"),
    *("--set", "evaluation={every: 50, samples: 64, nfe: [1], features: pooled, grid: 2}"),
    *("--set", "search={space: {}, metric: eval/fd_nfe1}"),
    *("--set", "resources.cpus_per_worker=0.5"),
]


def start(storage: Storage, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "soflow_platform.cli.main",
            "run",
            "digits",
            "--storage",
            str(storage.root),
            *SETTINGS,
            *more,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the sweep did not get there in time"
        time.sleep(0.05)


def trained_steps(storage: Storage) -> list[int]:
    records = all_records(storage)
    if not records:
        return []
    root = storage.trial(records[0].id, records[0].trials[0]["name"]) / "checkpoints"
    return [checkpoint.position.step for checkpoint in published(root)]


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train; their names say so."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    return [p for p in everyone if any("RayTrainWorker" in part for part in p.cmdline())]


@pytest.mark.faults
@pytest.mark.parametrize("count", [1, 2])
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(tmp_path: Path, count: int) -> None:
    storage = Storage(tmp_path / "runs")
    process = start(storage, "--set", f"resources.workers={count}")
    wait_for(lambda: len(trained_steps(storage)) >= 2, process)
    victims = workers(process)
    assert len(victims) == count
    victims[-1].send_signal(signal.SIGKILL)
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    (record,) = all_records(storage)
    assert record.attempts == 1
    tracking = Tracking(storage.tracking_uri, "digits", record.experiment_id or "")
    (run,) = tracking.children(record.run or "")
    assert run.info.status == "FINISHED"
    for metric, every in (("train/loss", 10), ("eval/fd_nfe1", 50)):
        history = client_for(storage.tracking_uri).get_metric_history(run.info.run_id, metric)
        first = [1] if every == 10 else []
        assert [m.step for m in history] == [*first, *range(every, STEPS + 1, every)]
    assert f"step {STEPS}" in printed
