"""The state of a trial: one enumeration, one schema, one table that derives what `soflowctl status` shows."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import pytest

from soflow_core.failures import InputError
from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.training.trial_status import (
    STATUS,
    TrialState,
    TrialStatus,
    TrialStatusWriter,
    read_status,
)
from soflow_platform.tuning.progress import ProgressActor
from soflow_platform.tuning.status import TrialFacts, derive_state

NOTHING = TrialFacts(
    written=None, sweep_runs=False, sweep_finished=False, stop_requested=False, begun=False, complete=False
)
STATES = [
    ({}, TrialState.NOT_STARTED),
    ({"begun": True}, TrialState.CUT),
    ({"begun": True, "written": TrialState.RUNNING}, TrialState.CUT),
    ({"begun": True, "written": TrialState.RUNNING, "sweep_finished": True}, TrialState.PRUNED),
    ({"begun": True, "written": TrialState.RUNNING, "complete": True}, TrialState.FINISHED),
    ({"begun": True, "complete": True, "sweep_finished": True}, TrialState.FINISHED),
    ({"sweep_runs": True}, TrialState.WAITING),
    ({"sweep_runs": True, "begun": True}, TrialState.WAITING),
    ({"sweep_runs": True, "written": TrialState.EVALUATING}, TrialState.EVALUATING),
    ({"sweep_runs": True, "stop_requested": True}, TrialState.STOPPING),
    (
        {"sweep_runs": True, "stop_requested": True, "written": TrialState.RUNNING},
        TrialState.STOPPING,
    ),
    ({"sweep_runs": True, "stop_requested": True, "written": TrialState.FINISHED}, TrialState.FINISHED),
]


@pytest.mark.parametrize(("facts", "state"), STATES)
def test_a_state_is_derived_from(facts: dict[str, object], state: TrialState) -> None:
    assert derive_state(replace(NOTHING, **facts)) is state  # type: ignore[arg-type]


def test_an_ended_trial_keeps_its_state_whatever_else_holds() -> None:
    ended = [state for state in TrialState if state.ended]
    assert ended == [TrialState.STOPPED, TrialState.PRUNED, TrialState.FINISHED, TrialState.FAILED]
    for state, flags in itertools.product(ended, itertools.product([False, True], repeat=5)):
        assert derive_state(TrialFacts(state, *flags)) is state


def test_the_status_file_is_the_status(tmp_path: Path) -> None:
    writer = TrialStatusWriter(tmp_path, "trial", 400, attempt=2)
    writer.set_state(TrialState.EVALUATING, step=7)
    status = read_status(tmp_path)
    assert status is not None
    assert (status.state, status.step, status.steps, status.attempt) == (TrialState.EVALUATING, 7, 400, 2)
    content = read_json(tmp_path / STATUS)
    assert content is not None
    assert content["state"] == "evaluating"
    assert "failure" not in content


def test_a_status_of_an_earlier_or_a_later_version_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / STATUS, {"state": "stopped", "step": 3, "colour": "green"})
    assert read_status(tmp_path) == TrialStatus(state=TrialState.STOPPED, step=3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"state": "running"', "is damaged: it is no JSON file"),
        ("[1]", "is damaged: it holds no JSON object"),
        ('{"state": "dancing"}', "is damaged: `state` is 'dancing'"),
        ('{"state": "running", "step": "three"}', "is damaged: `step` is 'three'"),
        ('{"state": "running", "format": 2}', "is of format 2 and this version of soflow reads 1"),
    ],
)
def test_a_status_that_cannot_be_read_is_refused_in_a_sentence(
    tmp_path: Path, content: str, sentence: str
) -> None:
    (tmp_path / STATUS).write_text(content)
    with pytest.raises(InputError, match=re.escape(sentence)):
        read_status(tmp_path)
    # A trial writes its own status all the same.
    TrialStatusWriter(tmp_path, "trial", 400, attempt=1).set_state(TrialState.STARTING)
    assert read_status(tmp_path) is not None


def test_a_state_begins_when_it_changes() -> None:
    actor = ProgressActor()
    actor.update("trial", {"state": TrialState.STARTING})
    since = actor.progress("trial").since
    assert since is not None
    actor.update("trial", {"state": TrialState.STARTING, "step": 3})
    assert (actor.progress("trial").since, actor.progress("trial").step) == (since, 3)
    actor.update("trial", {"state": TrialState.RUNNING})
    assert (actor.progress("trial").since or 0.0) > since


def test_a_late_message_of_another_worker_leaves_a_failure_standing() -> None:
    actor = ProgressActor()
    actor.update("trial", {"state": TrialState.RUNNING, "step": 4})
    actor.update("trial", {"state": TrialState.FAILED})
    actor.update("trial", {"failure": "shard-000000.tar is missing."})
    for late in (TrialState.RUNNING, TrialState.EVALUATING, TrialState.RESTARTING):
        actor.update("trial", {"state": late, "step": 5})
    status = actor.progress("trial")
    assert (status.state, status.failure) == (TrialState.FAILED, "shard-000000.tar is missing.")
    actor.update("trial", {"state": TrialState.STARTING})
    actor.update("trial", {"state": TrialState.RUNNING})
    assert actor.progress("trial").failure is None
