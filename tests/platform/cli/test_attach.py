"""A submitted sweep: what its job writes into the sweep's folder, and what attach makes of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from soflow_pipelines.storage.files import write_json
from soflow_platform.cli import attach
from soflow_platform.cli.attach import attach_command
from soflow_platform.errors import JobError, UserError
from soflow_platform.jobs.detached import (
    ENTRY,
    EXIT,
    JOB,
    OUTPUT,
    DetachedJob,
    end_of,
    job_of,
    require_same_from_everywhere,
)
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord


@pytest.fixture
def record(storage: ProjectFolder) -> SweepRecord:
    made = SweepRecord("away-1", "away", "away.yaml", {"training": {"steps": 4}}, [], "eval/fd_nfe1", "min")
    made.save(storage)
    return made


def submitted(storage: ProjectFolder, record: SweepRecord) -> Path:
    """The folder of the sweep, with a job of a cluster that no longer answers."""
    folder = storage.sweep(record.id)
    write_json(folder / JOB, vars(DetachedJob("raysubmit_1", "127.0.0.1:1", time.time())))
    return folder


def test_the_job_keeps_what_its_command_prints_and_how_it_ended(
    storage: ProjectFolder, record: SweepRecord
) -> None:
    folder = submitted(storage, record)
    command = [sys.executable, "-m", ENTRY, str(folder), "plan", "no-such-sweep"]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == done.stderr == ""
    assert "soflowctl: error: " in (folder / OUTPUT).read_text()
    end = end_of(storage, record.id)
    assert end is not None
    assert end.code == 2
    assert job_of(storage, record.id) == DetachedJob(
        "raysubmit_1", "127.0.0.1:1", job_of(storage, record.id).submitted
    )  # type: ignore[union-attr]


def test_attach_prints_what_comes_and_ends_with_the_commands_code(
    storage: ProjectFolder, record: SweepRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = submitted(storage, record)
    (folder / OUTPUT).write_text("begun\n")

    def later() -> None:
        with (folder / OUTPUT).open("a") as output:
            output.write("best trial\n")
        write_json(folder / EXIT, {"code": 1})

    timer = threading.Timer(0.3, later)
    timer.start()
    assert attach_command("away", str(storage.root)) == 1
    timer.join()
    assert capsys.readouterr().out == "begun\nbest trial\n"


def test_a_command_that_was_lost_is_said(
    storage: ProjectFolder, record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    (submitted(storage, record) / OUTPUT).write_text("")
    monkeypatch.setattr(attach, "LOST_SECONDS", 0.1)
    with pytest.raises(JobError, match=r"away-1 was lost \(job raysubmit_1 at 127.0.0.1:1: no answer\)"):
        attach_command("away", str(storage.root))


def test_a_sweep_that_was_not_submitted_has_nothing_to_attach_to(
    storage: ProjectFolder, record: SweepRecord
) -> None:
    with pytest.raises(UserError, match=r"away-1 was not submitted with --detach"):
        attach_command(record.id, str(storage.root))


def test_data_by_a_relative_path_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shards").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"pass --set data.source=/.*/shards"):
        require_same_from_everywhere("shards")
    require_same_from_everywhere(str(tmp_path / "shards"))
    require_same_from_everywhere("digits")
