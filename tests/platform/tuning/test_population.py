"""Decisions of population-based training, as a function of scores, settings, step and seed; and the lineages that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from soflow_platform.config.dimensions import Dimension
from soflow_platform.config.search import PbtConfig
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.lineage import Replacement, Rung, changes, describe, intervals
from soflow_platform.tuning.population import Population
from soflow_platform.tuning.record import SweepRecord, TrialEntry, load_record

LR = Dimension(log_uniform=(1e-4, 1e-2))
SHAPES = Dimension(choice=["constant", "linear", "cosine"])
NAMES = [f"trial-{number:02d}" for number in range(8)]
SCORES = {name: float(number) for number, name in enumerate(NAMES)}
SETTINGS = {name: {"optimizer.lr": 1e-3, "objective.schedule.kind": "linear"} for name in NAMES}


def allow_all(settings: Mapping[str, Any]) -> bool:
    del settings
    return True


def population(**settings: Any) -> Population:
    dimensions = {"optimizer.lr": LR, "objective.schedule.kind": SHAPES}
    return Population(PbtConfig(every=10, **settings), "min", dimensions, allow_all, seed=0)


def test_the_worst_share_copies_members_of_the_best_share() -> None:
    rung = population().decide(10, SCORES, SETTINGS)
    assert [each.trial for each in rung.replaced] == ["trial-06", "trial-07"]
    assert {each.source for each in rung.replaced} <= {"trial-00", "trial-01"}
    assert rung.scores == SCORES
    turned = replace(population(), mode="max").decide(10, SCORES, SETTINGS)
    assert [each.trial for each in turned.replaced] == ["trial-01", "trial-00"]


@pytest.mark.parametrize(("size", "share", "count"), [(2, 0.25, 1), (3, 0.5, 1), (4, 0.25, 1), (5, 0.25, 2)])
def test_at_least_one_and_at_most_half_are_replaced(size: int, share: float, count: int) -> None:
    scores = {name: SCORES[name] for name in NAMES[:size]}
    assert len(population(replaced=share).decide(10, scores, SETTINGS).replaced) == count


def test_nothing_but_scores_settings_step_and_seed_decides() -> None:
    decided = population().decide(10, SCORES, SETTINGS)
    assert population().decide(10, dict(reversed(SCORES.items())), SETTINGS) == decided
    assert population().decide(20, SCORES, SETTINGS).replaced != decided.replaced
    assert replace(population(), seed=1).decide(10, SCORES, SETTINGS).replaced != decided.replaced


def test_settings_move_by_their_distribution_and_stay_within_it() -> None:
    moved = [
        replacement.after
        for step in range(10, 2010, 10)
        for replacement in population(resample=0.0).decide(step, SCORES, SETTINGS).replaced
    ]
    # 1e-3 is the middle of [1e-4, 1e-2]; a share of 0.2 of it is a factor of 100^0.2.
    factor = 100**0.2
    assert {round(math.log(each["optimizer.lr"] / 1e-3, factor), 6) for each in moved} == {-1.0, 1.0}
    assert {each["objective.schedule.kind"] for each in moved} == {"constant", "cosine"}
    drawn = [
        replacement.after["optimizer.lr"]
        for step in range(10, 2010, 10)
        for replacement in population(resample=1.0).decide(step, SCORES, SETTINGS).replaced
    ]
    assert all(1e-4 <= value <= 1e-2 for value in drawn)
    assert min(drawn) < 2e-4
    assert max(drawn) > 5e-3


def test_at_the_end_of_a_range_a_setting_stays_in_it() -> None:
    settings = {name: {"optimizer.lr": 1e-2} for name in NAMES}
    for step in range(10, 200, 10):
        for each in population(resample=0.0).decide(step, SCORES, settings).replaced:
            assert 1e-4 <= each.after["optimizer.lr"] <= 1e-2


def test_settings_that_cannot_be_trained_are_not_taken() -> None:
    falling = replace(population(), allows=lambda settings: settings["optimizer.lr"] < 1e-3)
    for step in range(10, 200, 10):
        for each in falling.decide(step, SCORES, SETTINGS).replaced:
            assert each.after["optimizer.lr"] < 1e-3
    none = replace(population(), allows=lambda _: False)
    assert all(each.after == SETTINGS[each.source] for each in none.decide(10, SCORES, SETTINGS).replaced)


def test_a_score_of_nan_is_the_worst_and_is_never_copied() -> None:
    scores = {**SCORES, "trial-00": math.nan}
    rung = population().decide(10, scores, SETTINGS)
    assert [each.trial for each in rung.replaced] == ["trial-07", "trial-00"]
    assert rung.scores["trial-00"] is None
    hopeless = population(replaced=0.5).decide(10, dict.fromkeys(NAMES, math.nan), SETTINGS)
    assert hopeless.replaced == []


A, B = {"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}
RUNGS = [
    Rung(10, {"a": 1.0, "b": 2.0}, [Replacement("b", "a", B, {"optimizer.lr": 0.12})]),
    Rung(20, {"a": 2.0, "b": 1.0}, [Replacement("a", "b", A, {"optimizer.lr": 0.15})]),
]


def test_a_lineage_leads_to_the_first_ancestor() -> None:
    history = intervals({"a": A, "b": B}, RUNGS, "a")
    assert [(each.trial, each.after, each.settings["optimizer.lr"]) for each in history] == [
        ("a", 0, 0.1),
        ("b", 10, 0.12),
        ("a", 20, 0.15),
    ]
    assert changes(history) == [
        {"after": 10, "settings": {"optimizer.lr": 0.12}},
        {"after": 20, "settings": {"optimizer.lr": 0.15}},
    ]
    assert describe(history, 30) == "1-10 a (lr=0.1); 11-20 b (lr=0.12); 21-30 a (lr=0.15)"
    assert [each.trial for each in intervals({"a": A, "b": B}, RUNGS[:1], "a")] == ["a"]


def test_the_record_keeps_the_decisions_and_has_the_recipe_of_a_lineage(tmp_path: Path) -> None:
    storage = ProjectFolder(tmp_path)
    experiment = {"training": {"steps": 30}, "optimizer": {"lr": 0.1}}
    entries = [TrialEntry("a", {}), TrialEntry("b", {"optimizer.lr": 0.2})]
    SweepRecord("s-1", "s", "s.yaml", experiment, entries, "eval/fd_nfe1", "min", rungs=RUNGS).save(storage)
    record = load_record(storage, "s-1")
    assert record is not None
    assert record.rungs == RUNGS
    recipe = record.recipe("b")
    assert recipe["optimizer"] == {"lr": 0.1}
    assert recipe["training"]["changes"] == [{"after": 10, "settings": {"optimizer.lr": 0.12}}]
    assert record.planned("b")["optimizer"] == {"lr": 0.2}
    assert "changes" not in record.planned("b")["training"]
