"""Rules of `search.stop` end a trial that diverges, with its work saved; a sweep goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soflow_platform.config.search import StopLimits
from soflow_platform.errors import UserError
from soflow_platform.training.stop_rules import broken_rule
from soflow_platform.training.trial_status import TrialState, read_status
from soflow_platform.training.worker import Trainer
from tests.platform.conftest import small_experiment

Make = Callable[..., Trainer]


def test_a_value_that_breaks_a_rule_is_named_with_its_limit() -> None:
    rules: dict[str, Any] = {"train/loss": StopLimits(above=10, below=0.1), "eval/fd_nfe1": "nan"}
    assert broken_rule(rules, {"train/loss": 1.0, "eval/fd_nfe1": 3.0, "other": 99.0}) is None
    assert broken_rule(rules, {"train/loss": 12.5}) == "train/loss is 12.5, above 10"
    assert broken_rule(rules, {"train/loss": 0.05}) == "train/loss is 0.05, below 0.1"
    assert broken_rule(rules, {"eval/fd_nfe1": float("nan")}) == "eval/fd_nfe1 is nan"
    assert broken_rule(rules, {"train/loss": float("nan")}) is None


def test_a_loss_above_its_limit_ends_the_trial_with_a_checkpoint(worker: Make) -> None:
    trainer = worker("high", "search.stop={train/loss: {above: 1e-9}}")
    assert not trainer.run()
    assert trainer.step == 1
    assert [c.state.step for c in trainer.setup.checkpoints.published()] == [1]
    folder = trainer.setup.job.folder
    status = read_status(folder)
    assert status is not None
    assert (status.state, status.failure) == (TrialState.PRUNED, None)
    assert "ended by search.stop: train/loss is" in (folder / "log.txt").read_text()


def test_a_trial_that_a_rule_has_ended_stays_so_when_its_sweep_goes_on(worker: Make) -> None:
    """A sweep that was cut, or that grows, starts all of its trials again that have not come to their last step."""
    rule = "search.stop={eval/fd_nfe1: {above: 1e-9}}"
    first = worker("ended", rule)
    assert not first.run()
    saved = first.setup.checkpoints.published()[-1].state
    assert (saved.step, saved.ended) == (2, first.diverged)
    again = worker("ended", rule)
    assert not again.run()
    assert (again.step, again.evaluations) == (2, first.evaluations)
    status = read_status(again.setup.job.folder)
    assert status is not None
    assert status.state is TrialState.PRUNED
    # One that comes to its last step has finished, whatever its last value is.
    last = worker("last", rule, "evaluation.every=6")
    assert last.run()
    assert last.setup.checkpoints.published()[-1].state.ended is None


def test_a_loss_that_is_not_finite_ends_the_trial_where_a_rule_says_so(worker: Make) -> None:
    trainer = worker("broken", "search.stop={train/loss: nan}")
    read = trainer.loader._read

    def nan_at_third_step(start: int) -> Any:
        batch = read(start)
        if start == 2 * 8:
            batch.x0[0] = float("nan")
        return batch

    trainer.loader._read = nan_at_third_step  # type: ignore[method-assign]
    assert not trainer.run()
    assert [c.state.step for c in trainer.setup.checkpoints.published()] == [2]
    assert "is not finite at step 3 on rank 0" in (trainer.setup.job.folder / "log.txt").read_text()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("{train/lose: nan}", "search.stop has 'train/lose', which is never reported"),
        ("{train/loss: {}}", "a rule of `stop` is nan"),
        ("{train/loss: inf}", "search"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rules: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        small_experiment(f"search.stop={rules}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
