"""The record of a sweep: saved and loaded, from other versions too, or refused in a sentence."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soflow_core.failures import InputError
from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import (
    RECORD,
    BestTrial,
    SweepRecord,
    TrialEntry,
    load_record,
    require_unchanged,
)
from soflow_platform.tuning.recorded import known_trials
from soflow_platform.tuning.search_space import trials
from tests.support.sweep_files import MINIMAL, write

WRITTEN = SweepRecord(
    id="digits-aa11",
    name="digits",
    file="digits.yaml",
    experiment={"training": {"steps": 400}},
    trials=[TrialEntry("trial-00", {"objective.weight_power": 1}, 400)],
    metric="eval/fd_nfe1",
    mode="min",
    best=BestTrial("trial-00", 200, {"eval/fd_nfe1": 3.5}, ["grid.png"], "checkpoints/step-00000200"),
)


def stored(storage: ProjectFolder, **changes: Any) -> SweepRecord | None:
    """The record after some of its fields were changed in the file."""
    WRITTEN.save(storage)
    path = storage.sweep(WRITTEN.id) / RECORD
    write_json(path, {**(read_json(path) or {}), **changes})
    return load_record(storage, WRITTEN.id)


def test_what_is_written_is_read_back(storage: ProjectFolder) -> None:
    assert stored(storage) == WRITTEN
    assert load_record(storage, "digits-bb22") is None


def test_parts_that_are_not_there_are_left_out_of_the_file(storage: ProjectFolder) -> None:
    WRITTEN.save(storage)
    content = read_json(storage.sweep(WRITTEN.id) / RECORD)
    assert content is not None
    assert content["best"] == {
        "trial": "trial-00",
        "step": 200,
        "metrics": {"eval/fd_nfe1": 3.5},
        "grids": ["grid.png"],
        "checkpoint": "checkpoints/step-00000200",
    }


def test_fields_of_a_later_version_are_passed_over(storage: ProjectFolder) -> None:
    trial = {"name": "trial-00", "settings": {}, "colour": "green"}
    expected = replace(WRITTEN, trials=[TrialEntry("trial-00", {})])
    assert stored(storage, colour="green", trials=[trial], format=1) == expected


def test_a_trial_of_an_earlier_version_has_the_steps_of_its_sweep(storage: ProjectFolder) -> None:
    record = stored(storage, trials=[{"name": "trial-00", "settings": {}}])
    assert record is not None
    assert record.steps("trial-00") == 400


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"format": 2}, "sweep.json is of format 2 and this version of soflow reads 1: use a newer soflow."),
        ({"trials": "none"}, "sweep.json is damaged: `trials` is 'none'."),
        ({"trials": [{"settings": {}}]}, "sweep.json is damaged: it lacks 'name'."),
        ({"attempts": True}, "sweep.json is damaged: `attempts` is True."),
        ({"best": {"trial": "trial-00", "step": "last", "metrics": {}}}, "is damaged: `step` is 'last'."),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_in_a_sentence(
    storage: ProjectFolder, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)):
        stored(storage, **changes)


def test_a_record_that_is_no_json_is_refused_in_a_sentence(storage: ProjectFolder) -> None:
    path = storage.sweep(WRITTEN.id) / RECORD
    path.parent.mkdir(parents=True)
    path.write_text('{"id": "dig')
    with pytest.raises(InputError, match=r"sweep\.json is damaged: it is no JSON file"):
        load_record(storage, WRITTEN.id)


def test_trials_that_an_earlier_version_named_otherwise_keep_their_names(tmp_path: Path) -> None:
    space = "search={space: {objective: [{method: meanflow}, {method: meanflow, difference: 0.05}, {method: ict}]}}"
    experiment, document = read_experiment(write(tmp_path, MINIMAL), (space,))
    planned = trials(document, experiment)
    older = [
        TrialEntry(f"trial-0{i}-{name}", planned[i].settings)
        for i, name in enumerate(["meanflow", "meanflow"])
    ]
    # Settings that this version cannot read have no digest by which their trials could be known.
    for settings in (experiment.resolved(), WRITTEN.experiment):
        record = replace(WRITTEN, experiment=settings, trials=older)
        kept = known_trials(document, experiment, record, planned)
        assert [trial.name for trial in kept] == ["trial-00-meanflow", "trial-01-meanflow", "trial-02-ict"]
        assert [trial.experiment for trial in kept] == [trial.experiment for trial in planned]


def test_a_record_that_another_command_has_written_meanwhile_is_noticed(storage: ProjectFolder) -> None:
    require_unchanged(storage, WRITTEN.id, None)
    assert WRITTEN.best is not None
    scored = replace(WRITTEN, best=replace(WRITTEN.best, metrics={"eval/fd_nfe2": float("nan")}))
    scored.save(storage)
    known = load_record(storage, WRITTEN.id)
    assert known is not None
    known.code.append("0" * 12)
    require_unchanged(storage, WRITTEN.id, known)
    for before, now in ((None, scored), (known, replace(scored, attempts=1))):
        now.save(storage)
        with pytest.raises(UserError, match=f"{WRITTEN.id} was run by another command meanwhile"):
            require_unchanged(storage, WRITTEN.id, before)
