"""The database of an embedded tracking store: created whole or not at all, and refused in a sentence where it is damaged."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soflow_pipelines.storage import files
from soflow_pipelines.storage.files import move_if_absent
from soflow_platform.errors import UserError
from soflow_platform.tracking.outages import describe_outage
from soflow_platform.tracking.store import TrackingStore

PREPARE = """
import sys
from soflow_platform.tracking.store import TrackingStore
TrackingStore(f"sqlite:///{sys.argv[1]}").prepare()
"""


def test_a_store_whose_creation_was_killed_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with subprocess.Popen([sys.executable, "-c", PREPARE, str(path)]) as process:
        while process.poll() is None and not any(
            part.stat().st_size for part in tmp_path.glob(".*/mlflow.db")
        ):
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -9
    assert not path.exists()
    TrackingStore(f"sqlite:///{path}").prepare()
    assert len(TrackingStore(f"sqlite:///{path}").client.search_experiments()) == 1


def test_a_store_that_is_there_is_kept(tmp_path: Path, empty_store: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_store.read_bytes())
    TrackingStore(f"sqlite:///{path}").client.create_experiment("mine")
    TrackingStore(f"sqlite:///{path}").prepare()
    assert TrackingStore(f"sqlite:///{path}").client.get_experiment_by_name("mine") is not None


@pytest.mark.parametrize("damage", ["text", "half"])
def test_a_database_that_cannot_be_used_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "mlflow.db"
    if damage == "text":
        path.write_text("this is no database" * 100)
    else:
        with sqlite3.connect(path) as database:
            database.execute("create table _alembic_tmp_params (key text)")
            database.execute("create table experiments (experiment_id integer)")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used"):
        TrackingStore(f"sqlite:///{path}").prepare()
    if damage == "text":
        assert path.read_bytes() == before


def test_a_full_disk_under_a_database_is_an_outage(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "x.db") as database:
        database.execute("create table t (x)")
        database.execute("pragma max_page_count = 2")
        with pytest.raises(sqlite3.OperationalError) as caught:
            database.executemany("insert into t values (?)", [("x" * 1000,)] * 100)
    outage = describe_outage(caught.value)
    assert outage is not None
    assert outage.endswith("database or disk is full")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_moved_where_none_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError(files.NO_LINKS[0], "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    first, second, path = tmp_path / "first", tmp_path / "second", tmp_path / "path"
    first.write_text("first")
    second.write_text("second")
    assert move_if_absent(first, path)
    assert not move_if_absent(second, path)
    assert (path.read_text(), first.exists(), second.exists()) == ("first", False, True)
