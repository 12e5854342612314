"""An exception in a trial: the sentence that names the line at fault, the whole traceback, and whether another start may help."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError

from soflow_core.failures import InputError
from soflow_core.networks import DiTConfig
from soflow_core.objectives import FlowMatching
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import JobError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import FAILURE_TAG, Tracking
from soflow_platform.training.failure import Failure, another_start_may_help
from soflow_platform.training.launch import train_here
from soflow_platform.training.trial_log import LOG, read_tail
from soflow_platform.training.trial_status import FAILURE, TrialState, read_status
from tests.platform.conftest import small_experiment
from tests.support.trained_trials import job_of

HERE = Path(__file__)


def raised(action: Callable[[], object]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def line_of(function: Callable[..., object], text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


def parse_nothing() -> None:
    json.loads("nothing")


def test_a_failure_names_the_innermost_line_that_is_no_librarys() -> None:
    failure = Failure.of(raised(parse_nothing))
    place = f"{HERE}:{line_of(parse_nothing, 'json.loads')}, parse_nothing"
    assert failure.sentence == f"JSONDecodeError: Expecting value: line 1 column 1 (char 0) ({place})"
    assert "json/decoder.py" in failure.traceback


def test_a_line_of_the_project_is_named_from_its_package_on() -> None:
    failure = Failure.of(raised(lambda: DiTConfig(1, 8, 8, patch=3, hidden=16, depth=1, heads=2)))
    assert "(soflow_core/networks/dit.py:" in failure.sentence
    assert failure.sentence.endswith(", __post_init__)")


def test_a_text_for_the_user_stays_as_it_is() -> None:
    assert Failure.of(InputError("name other data.")).sentence == "name other data."
    assert Failure.of(JobError("the loss is not finite.")).sentence == "the loss is not finite."


def test_an_exception_without_a_text_is_named_by_its_class() -> None:
    assert Failure.of(AssertionError()).sentence == "AssertionError"


@pytest.mark.parametrize(
    "error",
    [
        OSError("read failed"),
        StorageError("S3 does not answer"),
        MemoryError(),
        RayActorError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:598] Connection closed by peer"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_machine_or_a_service_at_fault_is_tried_again(error: Exception) -> None:
    assert another_start_may_help(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (16) must match the size of tensor b (15)"),
        TypeError("unsupported operand"),
        NotImplementedError("connect the branches"),
        JobError("the loss is not finite"),
        InputError("name other data"),
    ],
)
def test_a_mistake_in_code_or_input_is_not_tried_again(error: Exception) -> None:
    assert not another_start_may_help(error)


def broken_loss(self: Any, network: Any, batch: Any, *rest: Any) -> Any:
    del self, network, rest
    return batch.x0 + batch.x0[:, :, :-1]


def test_a_trial_keeps_the_traceback_of_its_loss(
    storage: ProjectFolder, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlowMatching, "loss", broken_loss)
    experiment = small_experiment("objective={method: flow_matching}")
    job = job_of(storage, tracking, experiment)
    with pytest.raises(RuntimeError, match="size of tensor"):
        list(train_here(job, experiment, None))

    status = read_status(job.folder)
    assert status is not None
    assert status.state is TrialState.FAILED
    place = f"({HERE}:{line_of(broken_loss, 'x0[:')}, broken_loss)"
    assert status.failure is not None
    assert status.failure.startswith("RuntimeError: The size of tensor a (8)")
    assert status.failure.endswith(place)
    kept = (job.folder / FAILURE).read_text()
    assert kept.startswith("Traceback (most recent call last):")
    assert f'File "{HERE}"' in kept
    shown = read_tail(job.folder / LOG, 3)
    assert [line.split("  | ", 1)[1] for line in shown[1:-1]] == kept.splitlines()
    assert shown[-1].endswith(place)


def test_a_run_has_its_failure_until_it_is_opened_again(tracking: Tracking) -> None:
    run = tracking.open_run("sweep", "trial", params={}, tags={}, trial="trial")
    tracking.log_failure(run, "TypeError: no (loss.py:3, loss)", "Traceback\nTypeError: no\n")
    assert tracking.client.get_run(run).data.tags[FAILURE_TAG] == "TypeError: no (loss.py:3, loss)"
    assert [each.path for each in tracking.client.list_artifacts(run)] == ["failure.txt"]
    assert tracking.open_run("sweep", "trial", params={}, tags={}, trial="trial") == run
    assert FAILURE_TAG not in tracking.client.get_run(run).data.tags
