"""A sweep that other code has trained is neither shown as this code's result nor mixed with it unasked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soflow_platform.cli.main import main
from soflow_platform.config.document import apply_override, read_document
from soflow_platform.config.validation import validate
from soflow_platform.storage.code_digest import Code, running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import load_record, sweep_id
from tests.platform.conftest import ROOT
from tests.support.scored_sweep import SETTINGS, SWEEP

DIGITS = ROOT / "sweeps" / "digits.yaml"
LOSS = "soflow_core/objectives/soflow.py"
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def sweep(scored: ProjectFolder) -> str:
    """A finished sweep of these settings, which was trained with another SoFlow loss."""
    document = read_document(DIGITS)
    for setting in SETTINGS:
        apply_override(document, setting)
    name = sweep_id(scored, validate(document), again=False)
    folder = scored.sweep(SWEEP).rename(scored.sweep(name))
    code = Code({**running_code().files, LOSS: "0" * 12})
    write(folder / "code.json", dict(code.files))
    record = json.loads((folder / "sweep.json").read_text())
    write(folder / "sweep.json", {**record, "id": name, "finished": True, "code": [code.digest]})
    return name


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def run(scored: ProjectFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """soflowctl run of the sweep, in this process -> (exit code, what it printed)."""
    monkeypatch.setenv("SOFLOW_STORAGE", str(scored.root))
    monkeypatch.setenv("COLUMNS", "400")
    settings = [word for each in SETTINGS for word in ("--set", each)]

    def run(*options: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["soflowctl", "run", str(DIGITS), *settings, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def test_its_result_is_refused_with_the_files_that_differ(run: Command, sweep: str) -> None:
    code, printed = run()
    assert code == 2
    assert (
        f"sweep {sweep} was trained by other code than this: {LOSS} differs. --again trains it anew"
        in printed
    )
    assert "best trial" not in printed


def test_with_keep_its_result_is_shown_as_that_of_other_code(run: Command, sweep: str) -> None:
    code, printed = run("--keep")
    assert code == 0
    assert f"sweep {sweep} is finished" in printed
    assert f"{LOSS} differs; what it has trained is kept." in printed
    assert "best trial" in printed


def test_again_takes_another_sweep_and_leaves_this_one(scored: ProjectFolder, sweep: str) -> None:
    document = read_document(DIGITS)
    for setting in SETTINGS:
        apply_override(document, setting)
    assert sweep_id(scored, validate(document), again=True) == f"{sweep}-2"


def test_going_on_with_this_code_is_noted_beside_the_other(scored: ProjectFolder, sweep: str) -> None:
    record = load_record(scored, sweep)
    assert record is not None
    assert record.other_files(scored, running_code()) == [LOSS]
    record.trained_by(scored, running_code())
    assert record.other_files(scored, running_code()) == []
    assert record.code == [Code({**running_code().files, LOSS: "0" * 12}).digest, running_code().digest]


def test_a_sweep_of_an_earlier_version_is_not_refused(
    run: Command, scored: ProjectFolder, sweep: str
) -> None:
    path = scored.sweep(sweep) / "sweep.json"
    record = json.loads(path.read_text())
    del record["code"]
    write(path, record)
    code, printed = run()
    assert code == 0
    assert "is finished; --again runs it anew" in printed


def test_again_and_keep_exclude_each_other(run: Command) -> None:
    assert run("--again", "--keep") == (
        2,
        "soflowctl: error: --again trains anew and --keep goes on with what is there: pass one of them.\n",
    )
