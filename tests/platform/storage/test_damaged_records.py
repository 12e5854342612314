"""JSON files and tags that are damaged or nested without end are refused in a sentence, or made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from soflow_core.failures import InputError
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.preparation.state import RECIPE_NAME, begin
from soflow_pipelines.shards.info import ShardError
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.jobs.evaluate import ScoreStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.score_log import ScoreLog
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.trial_status import STATUS, read_status
from soflow_platform.tuning.record import load_record

DAMAGED = [b"", b"[", b"[" * 100_000, b"[]", b'"x"', b"\xff{}", b"\0" * 40]
IDS = [f"{text[:4]!r} of {len(text)}" for text in DAMAGED]


@pytest.mark.parametrize("content", DAMAGED, ids=IDS)
def test_a_damaged_record_of_a_sweep_is_named(tmp_path: Path, content: bytes) -> None:
    path = ProjectFolder(tmp_path).sweep("a-1") / "sweep.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"sweep\.json is damaged"):
        load_record(ProjectFolder(tmp_path), "a-1")


@pytest.mark.parametrize("content", DAMAGED, ids=IDS)
def test_a_damaged_score_is_made_again(tmp_path: Path, content: bytes) -> None:
    store = ScoreStore(tmp_path, ("fid",))
    path = store._path({"samples": "16"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    assert store.read("x", {"samples": "16"}) is None


@pytest.mark.parametrize("text", ["", "[" * 4000, "[]", "5"])
def test_settings_in_a_tag_that_are_damaged_count_as_other_ones(tracking: Tracking, text: str) -> None:
    run = tracking.open_run("sweep", "run", params={}, tags={"evaluate/fid.settings": text or "{"})
    assert ScoreLog(tracking.client, run, None).settings("evaluate/fid") == [{}]


@pytest.mark.parametrize("content", DAMAGED, ids=IDS)
def test_a_damaged_recipe_of_a_preparation_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / RECIPE_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    plan = ShardPlan(open_source("digits"), PrepareSettings(resolution=8))
    with pytest.raises(ShardError, match="is damaged"):
        begin(plan, open_storage(tmp_path))


@pytest.mark.parametrize("content", DAMAGED, ids=IDS)
def test_a_damaged_status_of_a_trial_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / STATUS).write_bytes(content)
    with pytest.raises(InputError, match="is damaged"):
        read_status(tmp_path)
