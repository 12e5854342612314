"""soflowctl run before Ray: the tried step, --local, and options that exclude each other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from soflow_core.objectives import FlowMatching
from soflow_platform.cli.main import main
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord, load_record, lock_sweep
from tests.platform.conftest import ROOT, SMALL

TWO_METHODS = "search.space={objective: [{method: soflow}, {method: flow_matching}]}"
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """soflowctl run of a small sweep of two methods, in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("SOFLOW_STORAGE", str(storage.root))
    settings = [word for each in (*SMALL, TWO_METHODS) for word in ("--set", each)]

    def run(*options: str) -> tuple[int, str, str]:
        argv = ["soflowctl", "run", str(ROOT / "sweeps" / "digits.yaml"), *settings, *options]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capfd.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def broken_loss(self: Any, network: Any, batch: Any, *rest: Any) -> Any:
    del self, network, rest
    return batch.x0 + batch.x0[:, :, :-1]


def test_an_exception_in_a_loss_ends_the_command_before_anything_is_started(
    run: Command, storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlowMatching, "loss", broken_loss)
    code, _, printed = run()
    assert code == 1
    assert printed.startswith("Traceback (most recent call last):")
    assert "    return batch.x0 + batch.x0[:, :, :-1]\n" in printed
    sentence = printed.splitlines()[-1]
    assert sentence.startswith("soflowctl: failed: trial trial-01-flow_matching fails in its first step: ")
    assert "test_run_command.py:" in sentence
    assert not storage.sweeps.exists()


def test_a_sweep_that_another_command_ran_before_the_lock_was_there_is_left_as_it_is(
    run: Command, storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[SweepRecord] = []

    @contextlib.contextmanager
    def later(project: ProjectFolder, sweep: str) -> Iterator[None]:
        record = SweepRecord(sweep, "digits", "digits.yaml", {}, [], "eval/fd_nfe1", "min", attempts=1)
        record.save(project)
        written.append(record)
        with lock_sweep(project, sweep):
            yield

    monkeypatch.setattr("soflow_platform.cli.run.lock_sweep", later)
    code, _, printed = run("--no-check", "--quiet")
    assert code == 2
    assert "was run by another command meanwhile: run the same command again." in printed
    assert load_record(storage, written[0].id) == written[0]


def test_a_local_run_prints_losses_and_scores_of_the_trial_that_is_named(
    run: Command, storage: ProjectFolder
) -> None:
    code, printed, _ = run("--local", "--trial", "trial-01")
    assert code == 0
    first, *lines = printed.splitlines()
    assert first == "training trial-01-flow_matching in this process; nothing of it is kept"
    assert [line for line in lines if line.startswith("step 6: loss ")]
    assert [line for line in lines if line.startswith("step 6: eval/fd_nfe1 ")]
    assert not storage.sweeps.exists()


def test_a_local_run_shows_the_traceback_of_an_exception(
    run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlowMatching, "loss", broken_loss)
    code, _, printed = run("--local", "--trial", "trial-01-flow_matching")
    assert code == 1
    assert "in broken_loss" in printed
    assert printed.splitlines()[-1].startswith("soflowctl: failed: trial trial-01-flow_matching failed: ")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--trial", "trial-01"], "--trial chooses the trial of --local"),
        (["--local", "--dry-run"], "--dry-run has no meaning with --local"),
        (["--local", "--address", "head:6379"], "--address has no meaning with --local"),
        (["--local", "--trial", "trial-0"], "--trial 'trial-0' is the beginning of 2 trials: choose one of"),
        (["--local", "--trial", "best"], "--trial 'best' is no trial of this sweep: choose one of"),
    ],
)
def test_options_without_a_meaning_are_refused(run: Command, options: list[str], sentence: str) -> None:
    code, _, printed = run(*options)
    assert code == 2
    assert sentence in printed
