"""Population-based training as a user starts it: under Ray, shown, reproduced, and the same where the command was killed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, TrackingStore
from soflow_platform.tuning.record import SweepRecord, all_records
from tests.support.commands import Run
from tests.support.killed_sweeps import kill_when
from tests.support.trained_state import differing_tensors, final_state

STEPS, EVERY = 60, 20
SETTINGS = [
    *("--set", "network={patch: 4, hidden: 32, depth: 2, heads: 2}"),
    *("--set", f"training={{steps: {STEPS}, batch: 32, ema: [0.9], log_every: 5, keep_checkpoints: 5}}"),
    *("--set", f"evaluation={{every: {EVERY}, samples: 64, nfe: [1], features: pooled, grid: 2}}"),
    *(
        "--set",
        f"search={{algorithm: sobol, trials: 4, metric: eval/fd_nfe1, pbt: {{every: {EVERY}}}, space: "
        "{optimizer.lr: {log_uniform: [1e-4, 1e-2]}, objective.weight_power: {uniform: [0, 1.5]}}}",
    ),
    "--no-check",
]


def record_of(storage: ProjectFolder, name: str = "digits") -> SweepRecord:
    (record,) = (record for record in all_records(storage) if record.name == name)
    return record


@pytest.fixture(scope="module")
def through(soflowctl: Run, tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A population that was never interrupted."""
    storage = ProjectFolder(tmp_path_factory.mktemp("population") / "runs")
    done = soflowctl("run", "digits", *SETTINGS, "--storage", str(storage.root))
    assert done.returncode == 0, done.stderr
    for step in (EVERY, 2 * EVERY):
        assert re.search(
            rf"step {step}: 4 trials compared by eval/fd_nfe1; go on with other settings: trial-0\d from trial-0\d",
            done.stdout,
        )
    return storage


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_population_is_trained_shown_and_reproduced(soflowctl: Run, through: ProjectFolder) -> None:
    record = record_of(through)
    assert record.finished
    assert record.best is not None
    assert [rung.step for rung in record.rungs] == [EVERY, 2 * EVERY]
    last = record.rungs[-1].replaced[0].trial
    tracking = Tracking(TrackingStore(through.tracking_uri), record.experiment_id or "")
    runs = {run.data.tags[TRIAL_TAG]: run for run in tracking.children(record.run or "")}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "; 41-60 trial-" in runs[last].data.tags["lineage"]
    steps = [m.step for m in tracking.client.get_metric_history(runs[last].info.run_id, "train/loss")]
    assert steps == sorted(set(steps)), "no step is logged twice"

    shown = soflowctl("runs", record.id, "--storage", str(through.root))
    assert shown.returncode == 0, shown.stderr
    assert "41-60 trial-" in shown.stdout
    written = soflowctl("report", record.id, "--storage", str(through.root))
    assert written.returncode == 0, written.stderr
    page = (through.sweep(record.id) / "report" / "report.html").read_text()
    assert "<h2>Population</h2>" in page

    number = last.split("-")[1]
    (text,) = re.findall(rf"<pre>(soflowctl run \S+ --set name=digits-trial-{number} .*)</pre>", page)
    arguments = shlex.split(text.replace("&#x27;", "'").replace("&quot;", '"').replace("&amp;", "&"))
    again = soflowctl(*arguments[1:], "--no-check", "--storage", str(through.root))
    assert again.returncode == 0, again.stderr
    other = record_of(through, f"digits-trial-{number}")
    roots = [
        str(each.checkpoints(through, name).root)
        for each, name in ((record, last), (other, other.trials[0].name))
    ]
    assert differing_tensors(final_state(roots[0]), final_state(roots[1])) == []


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_population_whose_driver_was_killed_goes_on_as_if_it_had_not_been(
    soflowctl: Run, through: ProjectFolder, tmp_path: Path
) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    arguments = ["run", "digits", *SETTINGS, "--storage", str(storage.root)]
    kill_when(lambda: bool(records := all_records(storage)) and bool(records[0].rungs), arguments)
    assert len(record_of(storage).rungs) == 1
    done = soflowctl(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going on with sweep" in done.stdout
    record, whole = record_of(storage), record_of(through)
    assert record.rungs == whole.rungs
    for trial in whole.trials:
        roots = [
            str(each.checkpoints(place, trial.name).root)
            for place, each in ((through, whole), (storage, record))
        ]
        assert differing_tensors(final_state(roots[0]), final_state(roots[1])) == []
