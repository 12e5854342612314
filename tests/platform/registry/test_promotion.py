"""A candidate becomes champion through a gate, and the champion before can be restored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soflow_platform.errors import UserError
from soflow_platform.registry import promotion, versions
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.worker import Trainer
from soflow_platform.tuning.record import BestTrial, SweepRecord

Register = Callable[..., str]
METRIC = "eval/fd_nfe1"


@pytest.fixture
def add(worker: Callable[..., Trainer], tracking: Tracking) -> Register:
    """Registers a trained trial as the result of a sweep that scored `value`."""
    trained = worker("trial")
    trained.run()
    checkpoint = trained.setup.checkpoints.published()[-1]

    def register(sweep: str, value: float, **tags: str) -> str:
        run = tracking.open_run(
            sweep, "trial", params={}, tags={"eval.features": "pooled-1", **tags}, trial="trial"
        )
        record = SweepRecord(sweep, "digits", "", {}, [], METRIC, "min", run=run)
        record.best = BestTrial("trial", 6, {METRIC: value})
        return versions.register(tracking, record.candidate("digits"), checkpoint)

    return register


def champion(tracking: Tracking) -> Any:
    return tracking.client.get_model_version_by_alias("digits", "champion")


def test_the_newest_registered_version_is_the_candidate(add: Register, tracking: Tracking) -> None:
    assert [add("a", 10.0), add("b", 12.0)] == ["1", "2"]
    assert versions.find_version(tracking.store, "digits").version == 2
    assert versions.find_version(tracking.store, "models:/digits@candidate").version == 2
    assert versions.find_version(tracking.store, "models:/digits/1").version == 1


def test_a_sweep_is_registered_once(add: Register) -> None:
    assert add("a", 10.0) == add("a", 10.0) == "1"


def test_a_better_version_passes_the_gate_and_a_worse_one_does_not(add: Register, tracking: Tracking) -> None:
    add("a", 10.0)
    assert promotion.promote(tracking.store, "digits").reason == "first champion"
    add("worse", 11.0)
    with pytest.raises(UserError, match=r"has eval/fd_nfe1 11 and champion 1 has 10: it is not better"):
        promotion.promote(tracking.store, "digits")
    assert champion(tracking).version == 1
    add("better", 9.0)
    done = promotion.promote(tracking.store, "digits")
    assert (done.version, done.previous, done.reason) == ("3", "1", "eval/fd_nfe1 9 is better than 10")
    assert champion(tracking).version == 3


def test_numbers_measured_in_another_way_are_not_compared(add: Register, tracking: Tracking) -> None:
    add("a", 10.0)
    promotion.promote(tracking.store, "digits")
    add("b", 1.0, **{"eval.features": "pooled-2"})
    with pytest.raises(UserError, match=r"cannot be compared with champion 1: they differ in eval.features"):
        promotion.promote(tracking.store, "digits")


def test_what_is_said_of_numbers_does_not_keep_them_apart(add: Register, tracking: Tracking) -> None:
    add("a", 10.0, **{"eval.flags": "sample 0 has values that are not finite (nfe 1)"})
    promotion.promote(tracking.store, "digits")
    add("b", 9.0)
    assert promotion.promote(tracking.store, "digits").version == "2"
    add("c", 8.0, **{"eval.flags": "32 samples in 64 features."})
    assert promotion.promote(tracking.store, "digits").version == "3"


def test_nan_never_passes_the_gate(add: Register, tracking: Tracking) -> None:
    add("a", 10.0)
    promotion.promote(tracking.store, "digits")
    add("b", float("nan"))
    with pytest.raises(UserError, match="it is not better"):
        promotion.promote(tracking.store, "digits")


def test_a_forced_promotion_records_its_reason_and_can_be_rolled_back(
    add: Register, tracking: Tracking
) -> None:
    add("a", 10.0)
    promotion.promote(tracking.store, "digits")
    add("worse", 11.0)
    promotion.promote(tracking.store, "digits", force="looks better")
    assert champion(tracking).version == 2
    assert champion(tracking).tags["soflow.promoted"].endswith("forced: looks better")
    done = promotion.rollback(tracking.store, "digits")
    assert (done.version, done.previous) == ("1", "2")
    assert champion(tracking).version == 1
    assert champion(tracking).tags["soflow.promoted"].endswith("rollback from version 2")
    with pytest.raises(UserError, match="is the first champion: there is none before it"):
        promotion.rollback(tracking.store, "digits")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/absent@champion", "there is no registered model 'absent'"),
        ("models:/digits/9", "model 'digits' has no version 9; it has 1"),
        ("models:/digits@champion", "model 'digits' has no version with alias 'champion'"),
    ],
)
def test_a_version_that_is_not_there_is_said_to_be(
    add: Register, tracking: Tracking, model: str, message: str
) -> None:
    add("a", 10.0)
    with pytest.raises(UserError, match=message):
        versions.find_version(tracking.store, model)
