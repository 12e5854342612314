"""Trials that results lead to: stored before they start, the same when a sweep goes on, and the best again in the end."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.checkpoints import EMA, CheckpointState
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.training.stop_request import clear_stops, request_stop
from soflow_platform.tuning.context import SweepContext, trial_outcome
from soflow_platform.tuning.display import Display
from soflow_platform.tuning.drawing import (
    DrawnTrials,
    add_trials,
    final_settings,
    is_complete,
    missing_finals,
    ranked_for_final,
)
from soflow_platform.tuning.ranking import ScoredTrial, ranked_points
from soflow_platform.tuning.record import load_record, new_or_resumed_record
from soflow_platform.tuning.recorded import known_trials, trials_of_record
from soflow_platform.tuning.search_space import Trial, trials
from soflow_platform.tuning.sweep import SweepRunner
from soflow_platform.tuning.tpe import Tried, TriedState
from tests.support.sweep_files import MINIMAL, write

SEARCH = (
    "search={algorithm: tpe, trials: 5, startup: 2, final: {best: 1, seeds: 2}, "
    "space: {objective.weight_power: {uniform: [0, 2]}, optimizer.lr: {log_uniform: [1e-4, 1e-2]}}}"
)


def started(storage: ProjectFolder, folder: Path, *overrides: str, search: str = SEARCH) -> SweepContext:
    """The sweep as a command finds it: what it has recorded so far, with its place."""
    experiment, document = read_experiment(write(folder, MINIMAL), (search, *overrides))
    planned = trials(document, experiment)
    existing = load_record(storage, "small")
    if existing is not None:
        planned = known_trials(document, experiment, existing, planned)
    record = new_or_resumed_record(existing, "small", "sweep.yaml", experiment, planned)
    record.attempts = 1
    record.save(storage)
    return SweepContext(record, experiment, planned, storage, Display(), document)


def ended(trial: Trial) -> CheckpointState:
    """The state of a trial whose score is the distance of its weight power from 1.5."""
    score = abs(trial.experiment.objective.weight_power - 1.5)
    evaluations: list[dict[str, Any]] = [
        {"step": step, "eval/fd_nfe1": score + 1 / step} for step in (20, 40)
    ]
    return CheckpointState(40, 640, "run", evaluations)


def anything(trial: Trial) -> None:
    assert trial.experiment.optimizer.lr <= 1e-2


def test_a_sweep_that_goes_on_draws_what_it_would_have_drawn(storage: ProjectFolder, tmp_path: Path) -> None:
    context = started(storage, tmp_path)
    drawn = DrawnTrials(context, {}, anything)
    whole = []
    for place in range(3):
        for trial in context.trials[place + 1 :]:
            for evaluation in ended(trial).evaluations:
                drawn.report(trial.name, evaluation)
            drawn.end(trial.name)
        assert drawn.left == 3 - place
        whole.append(drawn.draw())
    assert [trial.phase for trial in context.trials] == ["listed"] * 2 + ["drawn"] * 3
    assert drawn.left == 0
    stored = load_record(storage, "small")
    assert stored is not None
    assert [entry.name for entry in stored.trials] == [trial.name for trial in context.trials]
    assert [trial.experiment for trial in trials_of_record(stored)] == [t.experiment for t in context.trials]

    # Killed before the last one was drawn: the trials that it has are as they were, and the next one is the same.
    replace(stored, trials=stored.trials[:4]).save(storage)
    again = started(storage, tmp_path)
    assert [trial.experiment for trial in again.trials] == [trial.experiment for trial in context.trials[:4]]
    finished = {trial.name: ended(trial) for trial in again.trials[1:]}
    assert DrawnTrials(again, finished, anything).draw() == whole[2]


def test_nan_is_not_the_best_score_and_what_is_reported_again_is_known(
    storage: ProjectFolder, tmp_path: Path
) -> None:
    context = started(storage, tmp_path)
    drawn, (trial, *_) = DrawnTrials(context, {}, anything), context.trials
    last = trial.experiment.training.steps
    for step, score in ((1, math.nan), (last, 3.0), (1, math.nan)):
        drawn.report(trial.name, {"step": step, "eval/fd_nfe1": score})
    drawn.end(trial.name)
    assert drawn._tried[trial.name] == Tried(trial.settings, TriedState.FINISHED, (3.0,), last)


def test_a_sweep_that_was_asked_to_stop_draws_no_more(storage: ProjectFolder, tmp_path: Path) -> None:
    """Tune fills the place of a trial that stops at once; what is drawn then would be drawn without the results to come."""
    context = started(storage, tmp_path)
    drawn = DrawnTrials(context, {}, anything)
    assert drawn.left == 3
    request_stop(storage, context.record.id)
    assert drawn.left == 0
    clear_stops(storage, context.record.id)
    assert drawn.left == 3


def test_the_best_point_comes_again_with_seeds_that_no_trial_had(
    storage: ProjectFolder, tmp_path: Path
) -> None:
    context = started(storage, tmp_path)
    scores = [ScoredTrial(trial.name, trial.settings, place) for place, trial in enumerate(context.trials, 1)]
    points = final_settings(context, ranked_points(scores, "min"))
    assert points == [{**context.trials[0].settings, "seed": seed} for seed in (1, 2)]
    add_trials(context, points, "final")
    assert [trial.experiment.seed for trial in context.trials] == [0, 0, 1, 2]
    assert final_settings(context, ranked_points(scores, "min")) == []
    assert not is_complete(context)
    assert started(storage, tmp_path).trials == context.trials


def write_weights(folder: Path) -> None:
    (folder / EMA).write_bytes(b"weights")


EACH = (
    "search={final: {best: 1, seeds: 2, of_each: objective, metrics: {flow_matching: eval/fd_nfe4}}, "
    "space: {objective: [{method: soflow}, {method: flow_matching}], optimizer.lr: [1e-3, 1e-4]}}"
)


def test_the_best_point_of_each_method_comes_again_by_the_metric_of_the_method(
    storage: ProjectFolder, tmp_path: Path
) -> None:
    context = started(storage, tmp_path, "evaluation.nfe=[1, 4]", search=EACH)
    # At 1 NFE the first learning rate of both is the better one, at 4 the second one.
    for trial in context.trials:
        evaluation = {"step": 40, "eval/fd_nfe1": float(trial.index), "eval/fd_nfe4": float(-trial.index)}
        state = CheckpointState(40, 640, "run", [evaluation])
        context.record.checkpoints(storage, trial.name).publish(state, write_weights)
    outcomes = [trial_outcome(context, trial, None) for trial in context.trials]
    soflow, flow = ({"method": "soflow"}, {"method": "flow_matching"})
    points = final_settings(context, ranked_for_final(context, outcomes))
    assert points == [
        {"objective": method, "optimizer.lr": lr, "seed": seed}
        for method, lr in ((soflow, 1e-3), (flow, 1e-4))
        for seed in (1, 2)
    ]
    assert context.experiment.search.added == 4


def test_a_method_that_finishes_after_the_finals_were_chosen_gets_its_own(
    storage: ProjectFolder, tmp_path: Path
) -> None:
    """Its trials failed by a lost machine when the best of the others were chosen, and the same command trains them."""
    context = started(storage, tmp_path, "evaluation.nfe=[1, 4]", search=EACH)
    runner = SweepRunner(context, Tracking(TrackingStore(storage.tracking_uri), "0"))
    soflow = [trial for trial in context.trials if trial.experiment.objective.method == "soflow"]
    others = [trial for trial in context.trials if trial not in soflow]

    def score(trial: Trial) -> None:
        evaluation = {"step": 40, "eval/fd_nfe1": float(trial.index), "eval/fd_nfe4": float(trial.index)}
        state = CheckpointState(40, 640, "run", [evaluation])
        context.record.checkpoints(storage, trial.name).publish(state, write_weights)

    for trial in soflow:
        score(trial)
    lost = {trial.name: "its machine was lost" for trial in others}
    chosen = runner._final_trials(lost)
    assert [trial.experiment.objective.method for trial in chosen] == ["soflow"] * 2
    assert is_complete(context)
    for trial in others:
        score(trial)
    again = runner._final_trials({})
    assert again[:2] == chosen
    assert [trial.experiment.objective.method for trial in again[2:]] == ["flow_matching"] * 2
    # No others are chosen where nothing has changed, also by a command that has them from the record.
    assert runner._final_trials({}) == again
    later = started(storage, tmp_path, "evaluation.nfe=[1, 4]", search=EACH)
    assert missing_finals(later, {}) == []


@pytest.mark.parametrize(
    ("final", "message"),
    [
        ("{of_each: network}", "names `network`, which does not vary"),
        ("{of_each: objective.weight_power}", "is a range: name one with a list of values"),
        ("{metrics: {soflow: eval/fd_nfe1}}", "they need `of_each: objective`"),
    ],
)
def test_a_final_that_cannot_be_is_refused(
    storage: ProjectFolder, tmp_path: Path, final: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        started(storage, tmp_path, f"search.final={final}")
    assert message in str(caught.value)


def test_a_space_in_which_nothing_can_be_trained_ends_in_a_sentence(
    storage: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(trial: Trial) -> None:
        raise UserError(f"the data do not fit {trial.experiment.network.hidden}.")

    monkeypatch.setattr("soflow_platform.tuning.drawing.ATTEMPTS", 3)
    context = started(storage, tmp_path)
    with pytest.raises(JobError, match=r"\(3 were tried\): the data do not fit 32; widen it"):
        DrawnTrials(context, {}, refuse).draw()
    assert len(context.trials) == 2
