"""Proposals of Optuna's TPE: a function of the trials so far, in the space, and better than draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soflow_platform.config.search import SearchConfig
from soflow_platform.tuning.points import SearchSpace
from soflow_platform.tuning.tpe import Proposer, Tried, TriedState

FILE = {"a": 0.5, "b": 1e-3, "c": 2, "d": 0.0, "e": "x", "f": 1}
SPACE = {
    "a": {"uniform": [0, 1]},
    "b": {"log_uniform": [1e-4, 1e-2]},
    "c": {"integer": [1, 8]},
    "d": {"normal": [0.0, 1.0]},
    "e": {"choice": ["x", "y"]},
    "f": {"integer": [1, 3], "when": {"e": "y"}},
}


def proposer(space: dict[str, Any] = SPACE, modes: tuple[str, ...] = ("min",)) -> Proposer:
    search = SearchConfig(algorithm="tpe", trials=100, startup=5, space=space)
    return Proposer(SearchSpace(search, FILE), modes, seed=0)


def finished(settings: dict[str, Any], *values: float) -> Tried:
    return Tried(settings, TriedState.FINISHED, values)


def searched(value_of: Callable[[dict[str, Any]], float], trials: int, made: Proposer) -> list[Tried]:
    tried: list[Tried] = []
    for number in range(trials):
        point = made.propose(tried, number)
        tried.append(finished(point, value_of(point)))
    return tried


def test_a_proposal_is_a_function_of_the_trials_so_far_and_in_the_space() -> None:
    tried = searched(lambda point: (point["a"] - 0.3) ** 2, 12, proposer())
    for each in tried:
        point = each.settings
        assert 0 <= point["a"] <= 1
        assert 1e-4 <= point["b"] <= 1e-2
        assert point["c"] in range(1, 9)
        assert ("f" in point) == (point["e"] == "y")
    once = proposer().propose(tried, 12)
    assert once == proposer().propose(tried, 12)
    assert once != proposer().propose(tried, 12, attempt=1)
    assert once != proposer().propose(tried[:-3], 12)


def test_proposals_come_near_the_best_point() -> None:
    tried = searched(
        lambda p: (p["a"] - 0.3) ** 2 + (p["d"] - 1) ** 2 / 9,
        40,
        proposer({"a": {"uniform": [0, 1]}, "d": {"normal": [0.0, 1.0]}}),
    )
    late = [each.values[0] for each in tried[20:]]
    early = [each.values[0] for each in tried[:10]]
    assert sum(late) / len(late) < 0.4 * sum(early) / len(early)


def test_trials_that_run_failed_or_lie_outside_the_space_are_no_obstacle() -> None:
    made = proposer({"a": {"uniform": [0, 1]}})
    tried = searched(lambda point: point["a"], 8, made)
    odd = [
        Tried({"a": 0.1}, TriedState.RUNNING),
        Tried({"a": 0.1}, TriedState.FAILED),
        Tried({"a": 0.9}, TriedState.PRUNED, (5.0,), 10),
        finished({"a": 7.0}, 0.0),
        finished({"a": 0.2}, float("nan")),
        finished({}, 0.5),  # the file as it is written
    ]
    known = [made._known(each) for each in odd]
    assert [None if trial is None else trial.state.name for trial in known] == [
        "RUNNING", None, "PRUNED", None, None, "COMPLETE"
    ]  # fmt: skip
    assert known[5].params == {"a": 0.5}
    assert 0 <= made.propose([*tried, *odd], 20)["a"] <= 1


@pytest.mark.parametrize("modes", [("min", "min"), ("max", "min")])
def test_several_objectives_are_searched_at_once(modes: tuple[str, ...]) -> None:
    made = proposer({"a": {"uniform": [0, 1]}}, modes)
    tried: list[Tried] = []
    for number in range(12):
        point = made.propose(tried, number)
        tried.append(finished(point, point["a"], 1 - point["a"]))
    assert len({each.settings["a"] for each in tried}) == 12
