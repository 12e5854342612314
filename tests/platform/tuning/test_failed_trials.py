"""Trials that failed: by their own fault they stay so until they are to be tried again, by anything else they are tried again."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from soflow_core.failures import InputError
from soflow_platform.cli.run import describe_failures
from soflow_platform.errors import JobError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.training.failure import Failure
from soflow_platform.training.trial_status import TrialState, TrialStatus, TrialStatusWriter
from soflow_platform.training.worker import NonFiniteError
from soflow_platform.tuning.conclusion import Conclusion
from soflow_platform.tuning.context import failed_before, finished_trials
from soflow_platform.tuning.display import TrialOutcome
from soflow_platform.tuning.sweep import run_sweep
from tests.platform.tuning.test_finished_trials import NO_RAY, interrupted, scheduled


class OutOfMemoryError(RuntimeError):
    """As torch's, whose module is another for each device."""


@pytest.mark.parametrize(
    ("error", "own"),
    [
        (NonFiniteError("loss is not finite at step 3 on rank 0"), True),
        (OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (ValueError("shapes differ"), True),
        (RuntimeError("The size of tensor a must match"), True),
        (RuntimeError("NCCL timed out"), False),
        (JobError("the last checkpoint cannot be written"), False),
        (InputError("data.source has no such folder"), False),
        (OSError(28, "No space left on device"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_whose_fault_a_failure_is(error: Exception, own: bool) -> None:
    assert Failure.of(error).own_fault is own


def test_a_text_of_another_process_says_whether_memory_was_missing() -> None:
    assert Failure.of_text("ray.exceptions.OutOfMemoryError: task was killed", "...").own_fault
    assert not Failure.of_text("ray.exceptions.ActorDiedError: the actor died", "...").own_fault


def test_a_trial_that_failed_by_its_own_fault_is_not_started_and_the_others_are_concluded(
    scored: ProjectFolder,
) -> None:
    context = interrupted(scored)
    first, second = context.trials
    shutil.rmtree(scored.trial(context.record.id, first.name) / "checkpoints" / "step-00000006")
    writer = TrialStatusWriter(scored.trial(context.record.id, first.name), first.name, 6, attempt=1)
    writer.fail("the machine was lost", step=4)
    assert failed_before(scored, context.record, context.trials) == {}
    writer.fail("loss is not finite", step=4, own_fault=True)
    failed = failed_before(scored, context.record, context.trials)
    assert failed == {first.name: "loss is not finite"}
    assert scheduled(context) == [first.name]
    context = replace(context, failed=failed)
    assert scheduled(context) == []
    assert list(finished_trials(context)) == [second.name]

    outcomes = run_sweep(context, NO_RAY)
    assert [outcome.status.state for outcome in outcomes] == [TrialState.FAILED, TrialState.FINISHED]
    assert context.record.best is not None
    assert context.record.best.trial == second.name
    assert not context.record.finished
    assert describe_failures(outcomes, failed) == (
        f"1 of 2 trials failed ({first.name}: loss is not finite); --retry-failed tries them again."
    )


def test_where_all_trials_of_the_last_phase_failed_by_their_own_fault_the_option_that_tries_them_again_is_named(
    scored: ProjectFolder,
) -> None:
    """Whatever became of those before, which the best is not chosen from."""
    context = interrupted(scored)
    first, second = context.trials
    context = replace(context, trials=[first, replace(second, phase="final")])
    shutil.rmtree(scored.trial(context.record.id, second.name) / "checkpoints")
    writer = TrialStatusWriter(scored.trial(context.record.id, second.name), second.name, 6, attempt=1)
    conclusion = Conclusion(context, Tracking(TrackingStore(scored.tracking_uri), "1"))

    def refusal() -> str:
        with pytest.raises(JobError) as caught:
            conclusion.register_best(conclusion.collect({second.name: "it failed"}))
        return str(caught.value)

    writer.fail("the machine was lost", step=4)
    assert refusal().endswith("the same command tries again.")
    writer.fail("loss is not finite", step=4, own_fault=True)
    assert refusal().endswith("the same command with --retry-failed tries again.")
    assert first.name not in refusal()


def test_failures_are_counted_by_reason() -> None:
    def ended(name: str, failure: str | None) -> TrialOutcome:
        state = TrialState.FINISHED if failure is None else TrialState.FAILED
        return TrialOutcome(name, TrialStatus(state=state, failure=failure), None)

    outcomes = [ended("a", "nan"), ended("b", None), ended("c", "nan"), ended("d", "node lost")]
    assert describe_failures(outcomes, {"a": "nan", "c": "nan"}) == (
        "3 of 4 trials failed (a and 1 more: nan; d: node lost); the same command tries 1 of them again, --retry-failed all."
    )
    assert describe_failures(outcomes[1:2], {}) is None
