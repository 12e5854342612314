"""A sweep that goes on starts what is unfinished, and needs no Ray where nothing is."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from soflow_platform.config.document import apply_override, read_document
from soflow_platform.config.validation import validate
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.display import Display
from soflow_platform.tuning.record import all_records, load_record
from soflow_platform.tuning.search_space import trials
from soflow_platform.tuning.sweep import SweepContext, SweepRunner, finished_trials, open_tracking, run_sweep
from soflow_platform.tuning.trial import rung_step
from tests.platform.conftest import ROOT
from tests.support.scored_sweep import SETTINGS

NO_RAY = "127.0.0.1:1"
"""An address at which no Ray answers: a sweep that asked for one would raise."""


def interrupted(scored: ProjectFolder, *settings: str) -> SweepContext:
    """The trained sweep as if its command had been killed before it was concluded."""
    document = read_document(ROOT / "sweeps" / "digits.yaml")
    for setting in (*SETTINGS, *settings):
        apply_override(document, setting)
    experiment = validate(document)
    (record,) = all_records(scored)
    record = replace(record, finished=False, best=None, attempts=1)
    return SweepContext(record, experiment, trials(document, experiment), scored, Display())


def scheduled(context: SweepContext) -> list[str]:
    """Names of the trials that Tune is given."""
    runner = SweepRunner(context, open_tracking(context))
    return [trial.name for trial in runner._scheduled(finished_trials(context))]


def test_a_sweep_whose_trials_have_finished_is_concluded_without_ray(scored: ProjectFolder) -> None:
    context = interrupted(scored)
    outcomes = run_sweep(context, NO_RAY)
    assert [outcome.status.state for outcome in outcomes] == [TrialState.FINISHED] * 2
    record = load_record(scored, context.record.id)
    assert record is not None
    assert record.finished
    assert record.best is not None
    assert record.best.version == "1"
    tracking = open_tracking(context)
    assert tracking.client.get_run(record.run or "").info.status == "FINISHED"


def test_a_sweep_counts_as_finished_once_its_run_is_closed(
    scored: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished sweep the same command does nothing more: what was left open would stay so."""
    context = interrupted(scored)
    context.record.save(scored)

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tracking, "log_result", dies)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(context, NO_RAY)
    monkeypatch.undo()
    cut = load_record(scored, context.record.id)
    assert cut is not None
    assert not cut.finished
    run_sweep(replace(context, record=cut), NO_RAY)
    record = load_record(scored, context.record.id)
    assert record is not None
    assert record.finished
    run = open_tracking(context).client.get_run(record.run or "")
    assert run.info.status == "FINISHED"
    assert run.data.tags["best.version"] == "1"


def test_only_unfinished_trials_are_scheduled_unless_a_scheduler_compares(scored: ProjectFolder) -> None:
    context = interrupted(scored)
    first, second = context.trials
    shutil.rmtree(scored.trial(context.record.id, first.name) / "checkpoints" / "step-00000006")
    finished = finished_trials(context)
    assert list(finished) == [second.name]
    assert [evaluation["step"] for evaluation in finished[second.name].evaluations] == [2, 4, 6]
    assert scheduled(context) == [first.name]
    assert scheduled(interrupted(scored, "search.asha={first_rung: 2, reduction: 2}")) == [
        second.name,
        first.name,
    ]


def test_the_trials_that_got_furthest_fill_the_rungs_first(scored: ProjectFolder) -> None:
    context = interrupted(scored, "search.asha={first_rung: 2, reduction: 2, metric: eval/fd_nfe2}")
    first, second = context.trials
    for trial, lost in ((first, (2, 4, 6)), (second, (6,))):
        for step in lost:
            shutil.rmtree(
                scored.trial(context.record.id, trial.name) / "checkpoints" / f"step-{step:08d}",
                ignore_errors=True,
            )
    assert context.experiment.rung_metric == ("eval/fd_nfe2", "min")
    assert scheduled(context) == [second.name, first.name]


def test_rungs_are_at_equal_shares_of_trainings() -> None:
    for total in (7, 600, 1_200_000):
        assert all(rung_step(step, total, total) == step for step in range(1, total, max(1, total // 50)))
    assert rung_step(300, 900, 600) == 200
    assert rung_step(450, 900, 600) == 300


def test_a_sweep_that_never_started_has_no_finished_trials(scored: ProjectFolder) -> None:
    context = interrupted(scored)
    assert finished_trials(replace(context, record=replace(context.record, attempts=0))) == {}
