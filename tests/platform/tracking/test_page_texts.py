"""A run's description shows the newest sample grids; one that somebody wrote is kept."""

from __future__ import annotations

import shutil
import urllib.parse
from pathlib import Path

import numpy as np
import pytest

from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.page_texts import NOTE_TAG, grids_text, link_artifact
from soflow_platform.tracking.run_writer import RunWriter
from soflow_platform.tracking.store import Tracking


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Tracking:
    project = ProjectFolder(tmp_path_factory.mktemp("project"))
    shutil.copy(empty_store, project.root)
    return Tracking.open(project.tracking_uri, "grids", project)


def description(tracking: Tracking, run: str) -> str:
    return str(tracking.client.get_run(run).data.tags.get(NOTE_TAG, ""))


def test_the_newest_grid_of_each_number_of_evaluations_is_shown(tracking: Tracking, tmp_path: Path) -> None:
    run = tracking.open_run("digits-1", "trial", params={}, tags={}, trial="trial-00")
    writer = RunWriter(tracking.store, run)
    for step in (9, 10):
        for nfe in (2, 1):
            writer.write_image(step, f"samples/nfe{nfe}", np.full((4, 4, 3), step, dtype=np.uint8))
    text = description(tracking, run)
    assert text == grids_text(tracking.client, run)
    assert [line for line in text.splitlines() if line.startswith("NFE")] == [
        "NFE 1, step 10",
        "NFE 2, step 10",
    ]
    for line in text.splitlines():
        if line.startswith("!["):
            query = urllib.parse.parse_qs(line.split("get-artifact?")[1].rstrip(")"))
            assert query["run_uuid"] == [run]
            assert (
                Path(tracking.client.download_artifacts(run, query["path"][0], str(tmp_path))).stat().st_size
                > 0
            )


def test_a_description_that_somebody_wrote_is_kept_and_a_link_added_once(tracking: Tracking) -> None:
    run = tracking.open_run("digits-1", "noted", params={}, tags={NOTE_TAG: "mine"}, trial="trial-01")
    RunWriter(tracking.store, run).write_image(1, "samples/nfe1", np.zeros((4, 4, 3), dtype=np.uint8))
    assert description(tracking, run) == "mine"
    for _ in range(2):
        link_artifact(tracking.client, run, "Report", "report/report.html")
    page = f"#/experiments/{tracking.experiment_id}/runs/{run}/artifacts/report/report.html"
    assert description(tracking, run) == f"mine\n\n[Report]({page})"
