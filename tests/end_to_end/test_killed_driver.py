"""A sweep whose driver was killed goes on with the same command."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, TrackingStore
from soflow_platform.tuning.record import SweepRecord, all_records
from tests.support.commands import REDUCED, ROOT, Run, command, environment
from tests.support.killed_sweeps import kill_when, wait_for

pytestmark = pytest.mark.faults
ARGUMENTS = ["run", "sweeps/digits.yaml", *REDUCED]
ONE_AT_A_TIME = [
    *("--set", "resources.concurrent_trials=1"),
    *("--set", "search.space={objective.weight_power: [0.5, 1.0]}"),
]


def status_files(storage: ProjectFolder) -> list[str]:
    return [path.read_text() for path in storage.root.glob("sweeps/*/trials/*/status.json")]


def steps(storage: ProjectFolder, record: SweepRecord, number: int) -> list[int]:
    root = storage.trial(record.id, record.trials[number].name) / "checkpoints"
    return [checkpoint.state.step for checkpoint in CheckpointStore(root).published()]


def test_finished_trials_are_kept_and_the_killed_one_is_resumed(soflowctl: Run, tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    arguments = [*ARGUMENTS, *ONE_AT_A_TIME, "--storage", str(storage.root)]

    def reached() -> bool:
        found = all_records(storage)
        return bool(found) and 40 in steps(storage, found[0], 0) and 10 in steps(storage, found[0], 1)

    kill_when(reached, arguments)
    (record,) = all_records(storage)
    finished = storage.trial(record.id, record.trials[0].name) / "checkpoints" / "step-00000040"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.iterdir()}
    assert record.run is not None

    done = soflowctl(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stdout

    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in finished.iterdir()} == before
    (after,) = all_records(storage)
    assert (after.run, after.finished, after.attempts) == (record.run, True, 2)
    client = TrackingStore(storage.tracking_uri).client
    parents = client.search_runs([after.experiment_id or ""], "tags.`soflow.trial` IS NULL")
    assert [run.info.run_id for run in parents] == [record.run]
    tracking = Tracking(TrackingStore(storage.tracking_uri), after.experiment_id or "")
    children = tracking.children(record.run)
    assert sorted(run.data.tags[TRIAL_TAG] for run in children) == [trial.name for trial in after.trials]
    for run in children:
        assert run.info.status == "FINISHED"
        for metric, expected in (("eval/fd_nfe1", [10, 20, 30, 40]), ("train/loss", [1, *range(5, 41, 5)])):
            assert [m.step for m in client.get_metric_history(run.info.run_id, metric)] == expected
    assert len(client.search_model_versions("name = 'digits'")) == 1


def test_a_running_sweep_is_locked_and_a_terminated_one_closes_its_runs(
    soflowctl: Run, tmp_path: Path
) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    # More steps than the other commands take time.
    arguments = [*ARGUMENTS, "--set", "training.steps=4000", "--storage", str(storage.root)]
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        wait_for(lambda: bool(all_records(storage)), process)
        second = soflowctl(*arguments)
        assert second.returncode == 2
        assert "is running in another process" in second.stderr
        listed = soflowctl("runs", "--storage", str(storage.root))
        assert " running " in listed.stdout
        wait_for(lambda: '"running"' in "".join(status_files(storage)), process)
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert [line for line in errors.decode().splitlines() if line] == [
        "asked to stop: trials finish their step and save; once more ends at once.",
        "soflowctl: stopped: the sweep was asked to stop and its trials are saved: run the same command to go on.",
    ]
    (record,) = all_records(storage)
    runs = TrackingStore(storage.tracking_uri).client.search_runs([record.experiment_id or ""])
    assert {run.info.status for run in runs} == {"KILLED"}
    assert " stopped " in soflowctl("runs", "--storage", str(storage.root)).stdout
