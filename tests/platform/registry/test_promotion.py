"""The champion alias: moved by one command at a time, with its decision kept, and moved back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from soflow_platform.errors import JobError, UserError
from soflow_platform.jobs.promote import Outcome, promote
from soflow_platform.jobs.requests import PromoteRequest
from soflow_platform.registry import versions
from soflow_platform.registry.card import DESCRIPTION_LIMIT
from soflow_platform.registry.promotion import Champions, Decision
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.locks import locked
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.tuning.record import BestTrial, SweepRecord
from tests.support.scored_sweep import SWEEP, local_services

Register = Callable[..., str]
METRIC = "eval/fd_nfe1"


@pytest.fixture
def add(scored_once: ProjectFolder, tracking: Tracking) -> Register:
    """Registers the newest checkpoint of a trained trial as the result of a sweep that scored `value`."""
    checkpoints = CheckpointStore(scored_once.trial(SWEEP, "trial-00-soflow") / "checkpoints")
    checkpoint = checkpoints.published()[-1]

    def register(sweep: str, value: float, **tags: str) -> str:
        run = tracking.open_run(
            sweep, "trial", params={}, tags={"eval.features": "pooled-1", **tags}, trial="trial"
        )
        record = SweepRecord(sweep, "digits", "", {}, [], METRIC, "min", run=run)
        record.best = BestTrial("trial", 6, {METRIC: value})
        return versions.register(tracking, record.candidate("digits"), checkpoint)

    return register


@pytest.fixture
def champions(tracking: Tracking, storage: ProjectFolder) -> Champions:
    return Champions(tracking.store, storage, "digits")


@pytest.fixture
def by_stored_scores(storage: ProjectFolder) -> Callable[..., Outcome]:
    def decide(**settings: Any) -> Outcome:
        request = PromoteRequest("digits", reuse_scores="force" not in settings, **settings)
        return promote(request, local_services(storage))

    return decide


def version(tracking: Tracking, number: str) -> Any:
    return tracking.client.get_model_version("digits", number)


def test_the_newest_registered_version_is_the_candidate(add: Register, tracking: Tracking) -> None:
    assert [add("a", 10.0), add("b", 12.0)] == ["1", "2"]
    assert versions.find_version(tracking.store, "digits").version == 2
    assert versions.find_version(tracking.store, "models:/digits@candidate").version == 2
    assert versions.find_version(tracking.store, "models:/digits/1").version == 1


def test_a_sweep_is_registered_once(add: Register) -> None:
    assert add("a", 10.0) == add("a", 10.0) == "1"


def test_a_better_stored_score_passes_and_a_worse_one_does_not(
    add: Register, champions: Champions, by_stored_scores: Callable[..., Outcome]
) -> None:
    add("a", 10.0)
    assert by_stored_scores().decision.reason == "first champion"
    add("worse", 11.0)
    with pytest.raises(JobError, match=r"has eval/fd_nfe1 11 and champion 1 has 10: it is not better"):
        by_stored_scores()
    assert champions.present() == "1"
    add("better", 9.0)
    done = by_stored_scores().promotion
    assert done is not None
    assert (done.version, done.previous) == ("3", "1")
    assert done.reason.startswith("eval/fd_nfe1 9 is better than 10 (stored scores")
    assert champions.present() == "3"


def test_numbers_measured_in_another_way_are_not_compared(
    add: Register, by_stored_scores: Callable[..., Outcome]
) -> None:
    add("a", 10.0)
    by_stored_scores()
    add("b", 1.0, **{"eval.features": "pooled-2"})
    with pytest.raises(UserError, match=r"cannot be compared: they differ in eval.features; leave out"):
        by_stored_scores()


def test_what_is_said_of_numbers_does_not_keep_them_apart(
    add: Register, champions: Champions, by_stored_scores: Callable[..., Outcome]
) -> None:
    add("a", 10.0, **{"eval.flags": "sample 0 has values that are not finite (nfe 1)"})
    by_stored_scores()
    add("b", 9.0)
    by_stored_scores()
    assert champions.present() == "2"


def test_a_stored_nan_never_passes(add: Register, by_stored_scores: Callable[..., Outcome]) -> None:
    add("a", 10.0)
    by_stored_scores()
    add("b", float("nan"))
    with pytest.raises(JobError, match="it is not better"):
        by_stored_scores()


def test_a_forced_promotion_keeps_its_reason_with_who_and_when(
    add: Register, tracking: Tracking, by_stored_scores: Callable[..., Outcome]
) -> None:
    add("a", 10.0)
    by_stored_scores(force="the first of them")
    kept = version(tracking, "1")
    assert kept.tags["soflow.promoted"].endswith("forced: the first of them")
    assert kept.tags["promotion.decision"] == "forced"
    assert "@" in kept.tags["promotion.who"]
    assert kept.tags["promotion.when"].endswith("Z")
    assert kept.tags["promotion.commit"]
    assert "forced: the first of them" in kept.description.splitlines()[-1]


def test_rollback_goes_back_as_often_as_there_were_champions(add: Register, champions: Champions) -> None:
    for number in range(3):
        add(f"sweep-{number}", 10.0)
    for number, before in (("1", None), ("2", "1"), ("1", "2"), ("3", "1")):
        champions.move(number, Decision("forced", "forced: a test", before))
    restored = [champions.rollback() for _ in range(3)]
    assert [(done.version, done.previous) for done in restored] == [("1", "3"), ("2", "1"), ("1", "2")]
    with pytest.raises(UserError, match="is the first champion: there is none before it"):
        champions.rollback()
    assert champions.present() == "1"


def test_champions_of_an_earlier_version_are_restored(
    add: Register, champions: Champions, tracking: Tracking
) -> None:
    """It kept the champion before on each version, and no list."""
    for number in range(3):
        add(f"sweep-{number}", 10.0)
    client = tracking.client
    for number, before in (("1", ""), ("2", "1"), ("3", "2")):
        client.set_model_version_tag("digits", number, "soflow.previous_champion", before)
    client.set_registered_model_alias("digits", "champion", "3")
    assert [champions.rollback().version for _ in range(2)] == ["2", "1"]


def test_a_champion_that_was_deleted_is_not_restored(
    add: Register, champions: Champions, tracking: Tracking
) -> None:
    add("a", 10.0)
    add("b", 10.0)
    champions.move("1", Decision("forced", "forced: a test", None))
    champions.move("2", Decision("forced", "forced: a test", "1"))
    tracking.client.delete_model_version("digits", "1")
    with pytest.raises(UserError, match="version 1 of 'digits', the champion before version 2, was deleted"):
        champions.rollback()
    assert champions.present() == "2"


def test_of_two_promotions_at_once_one_wins_and_the_other_is_told(
    add: Register, champions: Champions
) -> None:
    """Both were decided against the same champion; the alias moves once."""
    for sweep in ("a", "b", "c"):
        add(sweep, 10.0)
    champions.move("1", Decision("forced", "forced: a test", None))
    first, second = (Decision("promoted", "better", "1") for _ in range(2))
    champions.move("2", first)
    with pytest.raises(
        JobError, match="compared with champion 1, and meanwhile another command made champion 2"
    ):
        champions.move("3", second)
    assert champions.present() == "2"


def test_a_command_waits_for_another_one_that_moves_the_alias(
    add: Register, champions: Champions, storage: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from soflow_platform.registry import promotion

    monkeypatch.setattr(promotion, "LOCK_SECONDS", 0)
    add("a", 10.0)
    with locked(storage.root / "registry" / "digits.lock") as acquired:
        assert acquired
        with pytest.raises(JobError, match="another command has been changing the champion of 'digits'"):
            champions.move("1", Decision("forced", "forced: a test", None))
    assert champions.present() is None


def test_decisions_fill_a_description_to_its_limit_and_no_further(
    add: Register, champions: Champions, tracking: Tracking
) -> None:
    add("a", 10.0)
    for number in range(40):
        champions.record("1", Decision("refused", f"decision {number} " + 200 * "x", None))
    description = version(tracking, "1").description
    assert len(description) <= DESCRIPTION_LIMIT
    assert description.startswith("# digits/1")
    assert "decision 39" in description
    assert "decision 0 " not in description


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("models:/absent@champion", "there is no registered model 'absent'"),
        ("models:/digits/9", "model 'digits' has no version 9; it has 1"),
        ("models:/digits@champion", "model 'digits' has no version with alias 'champion'"),
        ("models:/it's@champion", 'there is no registered model "it\'s"'),
        ('models:/"quoted"', "there is no registered model '\"quoted\"'"),
    ],
)
def test_a_version_that_is_not_there_is_said_to_be(
    add: Register, tracking: Tracking, model: str, message: str
) -> None:
    add("a", 10.0)
    with pytest.raises(UserError, match=message):
        versions.find_version(tracking.store, model)


def test_a_version_says_what_it_was_trained_with(add: Register, tracking: Tracking) -> None:
    add("a", 10.0)
    tags = version(tracking, "1").tags
    assert (tags["soflow.method"], tags["soflow.network"]) == ("soflow", "DiT-16x1/4")
    assert int(tags["soflow.parameters"]) > 1000
    assert tags["soflow.images"] == "48"
    assert json.loads(tags["soflow.recipe"]) == {}
