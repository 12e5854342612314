"""A sweep with an error in the code of one of its methods: what is printed, and what is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, TrackingStore
from soflow_platform.training.trial_log import LOG
from soflow_platform.training.trial_status import read_status
from soflow_platform.tuning.record import all_records
from tests.support.commands import ROOT, command, environment

SMALL = [
    *("--set", "network={patch: 4, hidden: 32, depth: 2, heads: 2}"),
    *("--set", "training={steps: 20, batch: 32, ema: [0.9], log_every: 5}"),
    *("--set", "evaluation={every: 10, samples: 64, nfe: [1], features: pooled, grid: 4}"),
    *("--set", "search.space={objective: [{method: soflow}, {method: flow_matching}]}"),
]
TARGET = "        target = path.velocity(batch.x0, draws.noise)\n"
BROKEN = TARGET.replace("\n", "[:, :, :-1]\n")


@pytest.fixture(scope="module")
def broken_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of soflow_core in which Flow Matching's loss raises."""
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(
        ROOT / "soflow_core", folder / "soflow_core", ignore=shutil.ignore_patterns("__pycache__")
    )
    module = folder / "soflow_core" / "objectives" / "flow_matching.py"
    text = module.read_text(encoding="utf-8")
    assert text.count(TARGET) == 1
    module.write_text(text.replace(TARGET, BROKEN), encoding="utf-8")
    return folder


def run_broken(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    paths = [folder, ROOT / "pipelines", ROOT / "platform"]
    return subprocess.run(
        command("run", str(ROOT / "sweeps" / "digits.yaml"), *SMALL, *options),
        cwd=folder,
        env={**environment(), "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_exception_in_a_loss_is_named_kept_and_not_tried_again(broken_core: Path, tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path / "runs")
    done = run_broken(broken_core, "--no-check", "--storage", str(project.root))
    source = (broken_core / "soflow_core" / "objectives" / "flow_matching.py").read_text().splitlines()
    (line,) = (number for number, text in enumerate(source, 1) if "(prediction - target)" in text)
    place = f"(soflow_core/objectives/flow_matching.py:{line}, loss)"
    assert done.returncode == 1
    assert "RuntimeError: The size of tensor a (8) must match the size of tensor b (7)" in done.stderr
    assert place in done.stderr
    assert "Last result" not in done.stdout

    (record,) = all_records(project)
    assert record.best is not None
    assert record.best.trial == "trial-00-soflow"
    folder = project.trial(record.id, "trial-01-flow_matching")
    status = read_status(folder)
    assert status is not None
    assert status.failure is not None
    assert status.failure.endswith(place)
    log = (folder / LOG).read_text()
    assert log.count("  starting with ") == 1
    assert log.count("Traceback (most recent call last):") == 1

    tracking = Tracking(TrackingStore(project.tracking_uri), record.experiment_id or "")
    (run,) = (
        r for r in tracking.children(record.run or "") if r.data.tags[TRIAL_TAG] == "trial-01-flow_matching"
    )
    assert run.info.status == "FAILED"
    assert run.data.tags["failure"] == status.failure
    (artifact,) = (f.path for f in tracking.client.list_artifacts(run.info.run_id) if f.path == "failure.txt")
    kept = Path(tracking.client.download_artifacts(run.info.run_id, artifact, str(tmp_path))).read_text()
    assert "in train_one_step" in kept
    assert kept.endswith("at non-singleton dimension 2\n")
