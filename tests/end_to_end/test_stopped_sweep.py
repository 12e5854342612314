"""`soflowctl stop` ends a trial or a sweep after its step; `soflowctl run` goes on from there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import all_records
from tests.support.commands import REDUCED, ROOT, Run, command, environment
from tests.support.killed_sweeps import wait_for

STEPS = 1500
ARGUMENTS = [
    *("run", "sweeps/digits.yaml", *REDUCED),
    *("--set", f"training.steps={STEPS}", "--set", "training.log_every=100"),
    *("--set", "evaluation.every=500", "--set", "search.space={objective.weight_power: [0.5, 1.0]}"),
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_trial_and_sweep_stop_with_their_work_saved_and_go_on(soflowctl: Run, tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    place = ("--storage", str(storage.root))

    def status() -> dict[str, dict[str, Any]]:
        trials = json.loads(soflowctl("status", "--json", *place).stdout)
        return {trial["trial"]: trial for trial in trials}

    def stopped() -> list[dict[str, Any]]:
        return [trial for trial in status().values() if trial["state"] == "stopped"]

    process = subprocess.Popen(
        command(*ARGUMENTS, *place), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(status()) == 2 and all(t["step"] > 20 for t in status().values()), process, 240)
        (record,) = all_records(storage)
        first, second = (trial.name for trial in record.trials)

        one = soflowctl("stop", first, *place)
        assert one.returncode == 0, one.stderr
        assert [trial["trial"] for trial in stopped()] == [first]
        assert process.poll() is None

        both = soflowctl("stop", record.id, *place)
        assert both.returncode == 0, both.stderr
        assert process.wait(timeout=60) == 143
    finally:
        process.kill()
        process.wait()
    for trial in status().values():
        assert trial["state"] == "stopped"
        assert 0 < trial["step"] < STEPS
        assert trial["checkpoint_step"] == trial["step"]
    assert soflowctl("status", *place).stdout.startswith(f"sweep {record.id}: stopped")
    (record,) = all_records(storage)
    client = TrackingStore(storage.tracking_uri).client
    tracking = Tracking(TrackingStore(storage.tracking_uri), record.experiment_id or "")
    runs = [client.get_run(record.run or ""), *tracking.children(record.run or "")]
    assert [run.info.status for run in runs] == ["KILLED"] * 3
    again = soflowctl("stop", record.id, *place)
    assert (again.returncode, "is not running (stopped)" in again.stderr) == (2, True)

    done = soflowctl(*ARGUMENTS, *place)
    assert done.returncode == 0, done.stderr
    assert {trial["state"] for trial in status().values()} == {"finished"}
    for run in tracking.children(record.run or ""):
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert [point.step for point in points] == [1, *range(100, STEPS + 1, 100)]
    log = soflowctl("logs", second, "-n", "1000", *place).stdout
    assert log.index("starting") < log.index("asked to stop") < log.index("going on")
