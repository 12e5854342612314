"""Sweeps that grow: a file with more values, methods, seeds or draws goes on with the trials that are there, under their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from soflow_platform.storage.code_digest import running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord, load_record, new_or_resumed_record, sweep_id
from soflow_platform.tuning.recorded import (
    awaits_results,
    describe_growth,
    grown_sweep,
    known_trials,
    sweep_of,
)
from soflow_platform.tuning.search_space import Trial, trials
from tests.support.sweep_files import MINIMAL, write

TWO = "search.space={objective.weight_power: [0.5, 1.0]}"


def started(storage: ProjectFolder, folder: Path, *overrides: str) -> tuple[SweepRecord, list[Trial]]:
    """The record and the trials of a sweep as `soflowctl run` starts it with these settings."""
    experiment, document = read_experiment(write(folder, MINIMAL), overrides)
    planned = trials(document, experiment)
    sweep = sweep_id(storage, experiment, again=False)
    existing = load_record(storage, sweep)
    if existing is None:
        grown = grown_sweep(storage, experiment, planned)
        existing = None if grown is None else grown.record
    if existing is not None:
        planned = known_trials(document, experiment, existing, planned)
        sweep = existing.id
    record = new_or_resumed_record(existing, sweep, "sweep.yaml", experiment, planned)
    record.attempts = 1
    record.trained_by(storage, running_code())
    record.save(storage)
    return record, planned


def names(planned: list[Trial]) -> list[str]:
    return [trial.name for trial in planned]


@pytest.mark.parametrize(
    ("before", "after", "added"),
    [
        (
            TWO,
            "search.space={objective.weight_power: [0.25, 0.5, 1.0]}",
            ["trial-02-weight_power=0.25"],
        ),
        (
            TWO,
            "search={seeds: 2, space: {objective.weight_power: [0.5, 1.0]}}",
            ["trial-02-weight_power=0.5-seed=1", "trial-03-weight_power=1-seed=1"],
        ),
        (
            TWO,
            "search={first: [{objective.weight_power: 0.75}], space: {objective.weight_power: [0.5, 1.0]}}",
            ["trial-02-weight_power=0.75"],
        ),
        (
            "search.space={objective: [{method: soflow}]}",
            "search.space={objective: [{method: meanflow}, {method: soflow}]}",
            ["trial-01-meanflow"],
        ),
        (
            "search={algorithm: sobol, trials: 2, space: {objective.weight_power: {uniform: [0, 1]}}}",
            "search={algorithm: sobol, trials: 3, space: {objective.weight_power: {uniform: [0, 1]}}}",
            1,
        ),
    ],
    ids=["value", "seed", "first", "method", "draws"],
)
def test_what_a_file_adds_comes_after_the_trials_that_are_there(
    storage: ProjectFolder, tmp_path: Path, before: str, after: str, added: list[str] | int
) -> None:
    first, old = started(storage, tmp_path, before)
    second, new = started(storage, tmp_path, after)
    assert second.id == first.id
    assert names(new)[: len(old)] == names(old)
    assert [t.experiment.training_digest() for t in new][: len(old)] == [
        t.experiment.training_digest() for t in old
    ]
    rest = names(new)[len(old) :]
    assert rest == added if isinstance(added, list) else len(rest) == added
    # The same file goes on with all of them, and the older one too.
    assert started(storage, tmp_path, after)[1] == new
    assert names(started(storage, tmp_path, before)[1]) == names(new)
    experiment, document = read_experiment(write(tmp_path, MINIMAL), (after,))
    found = sweep_of(storage, experiment, trials(document, experiment), sweep_id(storage, experiment, False))
    assert found is not None
    assert found.id == first.id


@pytest.mark.parametrize(
    "other",
    [
        "search.space={objective.weight_power: [0.25, 1.0]}",
        "search={metric: eval/fd_nfe2, space: {objective.weight_power: [0.25, 0.5, 1.0]}}",
        "name=other",
        "training.steps=60",
        "evaluation.samples=100",
    ],
    ids=["a value less", "metric", "name", "steps", "samples"],
)
def test_a_file_that_lacks_a_trial_or_scores_otherwise_is_another_sweep(
    storage: ProjectFolder, tmp_path: Path, other: str
) -> None:
    first, _ = started(storage, tmp_path, TWO)
    second, _ = started(storage, tmp_path, TWO, other)
    assert second.id != first.id


def test_other_code_is_named_where_a_sweep_could_grow(storage: ProjectFolder, tmp_path: Path) -> None:
    record, _ = started(storage, tmp_path, TWO)
    record.code.append("0" * 12)
    record.save(storage)
    (storage.sweep(record.id) / "code.json").write_text('{"soflow_core/ema.py": "other"}')
    experiment, document = read_experiment(
        write(tmp_path, MINIMAL), ("search.space={objective.weight_power: [0.25, 0.5, 1.0]}",)
    )
    grown = grown_sweep(storage, experiment, trials(document, experiment))
    assert grown is not None
    assert "soflow_core/ema.py" in grown.other_code


def test_a_recorded_trial_that_another_base_would_change_is_refused(
    storage: ProjectFolder, tmp_path: Path
) -> None:
    record, _ = started(storage, tmp_path, TWO)
    experiment, document = read_experiment(
        write(tmp_path, MINIMAL), ("objective.weight_eps=0.5", "search.space={objective.weight_power: [0.5]}")
    )
    with pytest.raises(UserError, match=r"trial-01-weight_power=1 .* has other settings than this file"):
        known_trials(document, experiment, record, trials(document, experiment))


def test_growth_is_said_and_more_draws_await_results(storage: ProjectFolder, tmp_path: Path) -> None:
    record, planned = started(storage, tmp_path, TWO)
    assert describe_growth(record, planned) is None
    tpe = (
        "search={algorithm: tpe, startup: 2, trials: %d, space: {objective.weight_power: {uniform: [0, 1]}}}"
    )
    experiment, document = read_experiment(write(tmp_path, MINIMAL), (tpe % 3,))
    planned = trials(document, experiment)
    assert len(planned) == 2
    assert awaits_results(experiment, planned)
    text = describe_growth(record, planned)
    assert text is not None
    assert text.endswith("; the 2 that it has are kept")
