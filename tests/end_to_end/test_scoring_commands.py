"""soflowctl evaluate and compare as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from soflow_platform.jobs.targets import find_target
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from tests.support.commands import Run
from tests.support.in_process import run_here
from tests.support.scored_sweep import SWEEP, digits_files, empty_store, trained_sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    store, files = empty_store(tmp_path_factory), digits_files(tmp_path_factory)
    return trained_sweep(tmp_path_factory.mktemp("swept") / "runs", store, files)


def test_a_trial_is_scored_on_the_cluster_and_the_score_kept_and_logged(
    swept: ProjectFolder, soflowctl: Run
) -> None:
    place = ("--storage", str(swept.root))
    arguments = ("evaluate", f"{SWEEP}/trial-01", "--num", "200", "--steps", "1,2", "--guidance", "2", *place)
    done = soflowctl(*arguments)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["images", "steps", "NFE", "fd", "label_agreement"]
    assert [line.split()[-4:-2] for line in lines[1:3]] == [["1", "2"], ["2", "4"]]
    assert "evaluate/fd200_nfe4_uniform" in lines[-1]
    again = run_here(*arguments, "--json")
    assert again.returncode == 0, again.stderr
    scores = json.loads(again.stdout)
    assert [score["settings"]["nfe"] for score in scores] == ["2", "4"]
    target = find_target(f"{SWEEP}/trial-01", swept, TrackingStore(swept.tracking_uri))
    metrics = TrackingStore(swept.tracking_uri).client.get_run(target.run or "").data.metrics
    assert [metrics[f"evaluate/fd200_nfe{nfe}_uniform"] for nfe in (2, 4)] == [
        score["fd"] for score in scores
    ]


@pytest.mark.slow
def test_the_methods_of_a_sweep_are_compared_in_a_table_that_is_kept(
    swept: ProjectFolder, soflowctl: Run
) -> None:
    done = soflowctl("compare", "digits", "--storage", str(swept.root))
    assert done.returncode == 0, done.stderr
    assert "Equal training steps" in done.stdout
    assert done.stdout.count("flow_matching") >= 3
    assert "equal steps, 1 NFE, no guidance: the best is" in done.stdout
    folder = swept.sweep(SWEEP) / "comparison"
    assert {path.name for path in folder.iterdir()} == {
        f"comparison.{kind}" for kind in ("md", "csv", "json", "png")
    }
    record = json.loads((folder / "comparison.json").read_text())
    # A single evaluation against a thousand.
    assert record["rows"][0]["speedup"] > 10
    guided = record["rows"][-1]
    assert (guided["sampling"], guided["nfe"], guided["samples"]) == ("euler, guidance 2", 4, 80)
    parent = json.loads((swept.sweep(SWEEP) / "sweep.json").read_text())["run"]
    client = TrackingStore(swept.tracking_uri).client
    assert {Path(f.path).name for f in client.list_artifacts(parent, "comparison")} == {
        path.name for path in folder.iterdir()
    }
    assert client.get_run(parent).data.tags["comparison.conclusions"] == " ".join(record["conclusions"])
