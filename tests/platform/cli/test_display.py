"""What a sweep prints without a terminal, and at its end: names as they are, and commands for the tracking store that was used."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from soflow_platform.cli.display import SweepDisplay, show_result
from soflow_platform.cli.terminal import console, storage_flag, styled, tracking_flag
from soflow_platform.cluster.connection import Cluster
from soflow_platform.config.validation import read_experiment
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.trial_status import TrialState, TrialStatus
from soflow_platform.tuning.record import BestTrial, SweepRecord
from soflow_platform.tuning.search_space import trials

DIGITS = Path(__file__).parents[3] / "sweeps" / "digits.yaml"
RUNNING = TrialStatus(TrialState.RUNNING, 1200, 6000, None, 310.4, 0.4123, 720.0)


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


class Screen:
    """A display that writes to a file, at a time that the test sets."""

    def __init__(self, quiet: bool = False) -> None:
        self.now, self.file = 0.0, io.StringIO()
        experiment, document = read_experiment(DIGITS, ("training.steps=6000",))
        self.trials = trials(document, experiment)
        console = Console(file=self.file, width=200)
        self.display = SweepDisplay(console, experiment, self.trials, quiet, clock=lambda: self.now)

    def lines(self) -> list[str]:
        """What was printed since the last call, without the time before it."""
        printed = self.file.getvalue().splitlines()
        self.file.seek(0)
        self.file.truncate()
        return [line.split(" s  ", 1)[1] for line in printed]


def test_each_trial_under_way_has_a_line_a_minute() -> None:
    screen = Screen()
    first, second, third, fourth = (trial.name for trial in screen.trials)
    statuses = {
        first: RUNNING,
        second: replace(RUNNING, state=TrialState.EVALUATING),
        third: TrialStatus(TrialState.FINISHED, 6000),
        fourth: TrialStatus(),
    }
    screen.now = 59
    screen.display.report_progress(statuses)
    assert screen.lines() == []
    screen.now = 61
    screen.display.report_progress(statuses)
    assert screen.lines() == [
        f"{first} step 1,200 of 6,000, 310 images/s, loss 0.412, 12 min left",
        f"{second} evaluating, step 1,200 of 6,000, loss 0.412",
    ]
    screen.now = 119
    screen.display.report_progress(statuses)
    assert screen.lines() == []
    screen.now = 122
    screen.display.report_progress({first: replace(RUNNING, step=2400)})
    assert len(screen.lines()) == 1


def test_what_keeps_a_trial_from_saving_is_printed_once_and_its_end() -> None:
    screen = Screen()
    name = screen.trials[0].name
    full = replace(RUNNING, trouble="saving failed (no space is left on the disk of /x)")
    for status in (RUNNING, full, replace(full, step=2400), RUNNING, RUNNING):
        screen.display.report_troubles({name: status})
    assert screen.lines() == [
        f"{name} saving failed (no space is left on the disk of /x)",
        f"{name} saves and logs again",
    ]


def test_a_quiet_sweep_prints_no_progress() -> None:
    screen = Screen(quiet=True)
    screen.now = 61
    screen.display.report_progress({screen.trials[0].name: RUNNING})
    screen.display.say("preparing data")
    with screen.display.describing():
        pass
    assert screen.lines() == []


def test_a_hint_names_folder_and_store_as_a_shell_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = ProjectFolder(tmp_path / "my runs")
    other = f"sqlite:///{tmp_path}/other store.db"
    assert tracking_flag(storage, None) == tracking_flag(storage, storage.tracking_uri) == ""
    flags = shlex.split(storage_flag(storage) + tracking_flag(storage, other))
    assert flags == ["--storage", str(storage.root), "--tracking", other]

    monkeypatch.setattr(SweepDisplay, "_watch", lambda _self, _actor: None)
    written = io.StringIO()
    experiment, _ = read_experiment(DIGITS)
    display = SweepDisplay(Console(file=written, width=400), experiment, [], storage=storage)
    display.start(finished(storage.tracking_uri), Cluster("here", True, 2, 0, 1, 1), None)
    display.stop()
    assert f"see it live: soflowctl ui --storage '{storage.root}'" in written.getvalue()
