"""What a finished sweep prints: names as they are, and the commands for the tracking store that was used."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from soflow_platform.cli.display import show_result
from soflow_platform.cli.terminal import console, styled
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import BestTrial, SweepRecord


def printed(record: SweepRecord, storage: ProjectFolder) -> str:
    screen = Console(file=io.StringIO(), width=200, markup=False)
    show_result(screen, record, storage)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


def finished(tracking_uri: str) -> SweepRecord:
    best = BestTrial("trial-00-a", 40, {"eval/fd_nfe1": 1.0}, model="small", version="1")
    return SweepRecord(
        id="small-1",
        name="small",
        file="small.yaml",
        experiment={},
        trials=[],
        metric="eval/fd_nfe1",
        mode="min",
        run="r",
        experiment_id="7",
        tracking_uri=tracking_uri,
        finished=True,
        best=best,
    )


def test_hints_name_the_server_that_was_used(tmp_path: Path) -> None:
    text = printed(finished("http://mlflow.example:5000"), ProjectFolder(tmp_path))
    assert "http://mlflow.example:5000/#/experiments/7/runs" in text
    assert "soflowctl ui" not in text
    assert "soflowctl promote models:/small@candidate" in text
    assert "--tracking http://mlflow.example:5000" in text


def test_hints_of_an_embedded_store_start_its_page(tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path)
    text = printed(finished(storage.tracking_uri), storage)
    assert "soflowctl ui" in text
    assert "--tracking" not in text


@pytest.mark.parametrize(
    "name", ["[/x]", "[link=file:///etc/passwd]x[/link]", ":smile:", "\x1b]0;x\x07\u202e"]
)
def test_text_is_shown_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    console().print(styled((name, "bold"), f": {name}"))
    shown = capsys.readouterr().out
    assert shown.strip().isprintable()
    assert shown.count(name.encode("unicode_escape").decode()) == 2
