"""A sweep whose points depend on results: killed, continued, and concluded with the best points again."""

from __future__ import annotations

from pathlib import Path

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord, all_records
from soflow_platform.tuning.status import trial_reports
from tests.support.commands import REDUCED, Run
from tests.support.killed_sweeps import kill_when

SEARCH = (
    "search={algorithm: tpe, trials: 8, startup: 3, first: [{}], final: {best: 2, seeds: 2}, "
    "space: {objective.weight_power: {uniform: [0, 1.5]}, objective.schedule.initial: {log_uniform: [0.05, 0.5]}}, "
    "constraints: [objective.schedule.initial > objective.schedule.final]}"
)
ARGUMENTS = ["run", "sweeps/digits.yaml", *REDUCED, "--set", SEARCH, "--no-check"]


def finished(storage: ProjectFolder, record: SweepRecord) -> list[str]:
    reports = trial_reports(storage, record, [trial.name for trial in record.trials])
    return [report.trial for report in reports if report.checkpoint_step == 40]


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_killed_search_keeps_its_trials_and_draws_the_rest(soflowctl: Run, tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    arguments = [*ARGUMENTS, "--storage", str(storage.root)]
    kill_when(
        lambda: bool(records := all_records(storage)) and len(finished(storage, records[0])) >= 5, arguments
    )
    (before,) = all_records(storage)
    kept = finished(storage, before)
    assert [trial.phase for trial in before.trials[:5]] == [None] * 4 + ["drawn"]

    done = soflowctl(*arguments)
    assert done.returncode == 0, done.stderr
    (record,) = all_records(storage)
    assert [trial.phase for trial in record.trials] == [None] * 4 + ["drawn"] * 5 + ["final"] * 4
    assert record.trials[: len(before.trials)] == before.trials
    assert len(finished(storage, record)) == 13
    for name in kept:
        # Their processes were not started again.
        assert "going on" not in (storage.trial(record.id, name) / "log.txt").read_text()
    finals = record.trials[9:]
    assert [trial.settings["seed"] for trial in finals] == [1, 2, 1, 2]
    points = [
        {key: value for key, value in trial.settings.items() if key != "seed"} for trial in record.trials
    ]
    assert points[9] == points[10] != points[11] == points[12]
    assert points[9] in points[:9]
    assert record.best is not None
    assert record.best.trial in [trial.name for trial in finals]
    assert record.best.std is not None
    assert record.finished
    assert f"over seeds {record.best.mean:.4g}" in done.stdout

    again = soflowctl(*arguments)
    assert (again.returncode, "is finished" in again.stdout) == (0, True)
