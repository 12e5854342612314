"""Search spaces: kinds of dimensions, conditions, constraints, seeds, and the algorithms that draw points."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from soflow_platform.config.constraints import Constraint
from soflow_platform.config.dimensions import Dimension
from soflow_platform.config.document import Document
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.search import SearchConfig
from soflow_platform.config.validation import read_experiment
from soflow_platform.errors import UserError
from soflow_platform.tracking.run_names import run_name
from soflow_platform.tuning.plan import plan_sweep
from soflow_platform.tuning.plan_assumptions import Assumptions
from soflow_platform.tuning.points import PointSettings, SearchSpace
from soflow_platform.tuning.ranking import Gap, ScoredTrial, gaps_to_best, ranked_points
from soflow_platform.tuning.search_space import trials
from soflow_platform.tuning.trial_names import named_settings
from tests.support.sweep_files import MINIMAL, write

FILE = {"objective": {"method": "soflow", "weight_power": 1.0}, "optimizer": {"lr": 1e-4, "warmup_steps": 10}}
EVERY_KIND = {
    "a": {"uniform": [1, 3]},
    "b": {"log_uniform": [1e-4, 1e-2]},
    "c": {"integer": [2, 5]},
    "d": {"normal": [1.0, 0.5]},
    "e": {"choice": ["x", "y", {"z": 1}]},
}


def points(seed: int = 0, **search: Any) -> list[dict[str, Any]]:
    return SearchSpace(SearchConfig(**search), FILE).points(seed)


@pytest.mark.parametrize("algorithm", ["random", "sobol"])
def test_draws_stay_in_their_dimensions_and_depend_on_the_seed_alone(algorithm: str) -> None:
    search = {"algorithm": algorithm, "trials": 64, "space": EVERY_KIND}
    drawn = points(**search)
    assert drawn == points(**search)
    assert drawn != points(seed=1, **search)
    assert drawn[:20] == points(**{**search, "trials": 20})
    for point in drawn:
        assert 1 <= point["a"] <= 3
        assert 1e-4 <= point["b"] <= 1e-2
        assert point["c"] in (2, 3, 4, 5)
        assert point["e"] in ("x", "y", {"z": 1})
    assert {point["c"] for point in drawn} == {2, 3, 4, 5}
    middle = sorted(point["d"] for point in drawn)
    assert abs(middle[31] - 1.0) < 0.3
    assert sum(abs(value - 1.0) < 0.5 for value in middle) / 64 == pytest.approx(0.683, abs=0.15)


def test_a_sobol_sequence_fills_every_part_of_the_space() -> None:
    drawn = points(algorithm="sobol", trials=64, space={"a": {"uniform": [0, 8]}, "b": {"uniform": [0, 8]}})
    assert {(int(point["a"]), int(point["b"])) for point in drawn} == {
        (a, b) for a in range(8) for b in range(8)
    }


@pytest.mark.parametrize(("kind", "inside"), [(kind, Dimension(**kind)) for kind in EVERY_KIND.values()])
def test_a_value_and_its_quantile_lead_to_each_other(kind: dict[str, Any], inside: Dimension) -> None:
    for quantile in (0.01, 0.3, 0.5, 0.99):
        value = inside.at(quantile)
        again = inside.quantile(value)
        assert again is not None
        assert inside.at(again) == (pytest.approx(value) if isinstance(value, float) else value)
    assert "normal" in kind or inside.quantile(-7) is None
    assert inside.quantile("w") is None


def test_every_value_of_a_grid_gets_the_same_draws() -> None:
    space = {"objective.method": {"grid": ["soflow", "ict"]}, "optimizer.lr": {"log_uniform": [1e-4, 1e-2]}}
    drawn = points(algorithm="random", trials=3, space=space)
    assert [point["objective.method"] for point in drawn] == ["soflow", "ict"] * 3
    assert [point["optimizer.lr"] for point in drawn[::2]] == [point["optimizer.lr"] for point in drawn[1::2]]


def test_a_conditional_setting_varies_where_its_condition_holds() -> None:
    space = {
        "objective.weight_power": {
            "choice": [0.5, 1.0],
            "when": {"objective.method": ["soflow", "meanflow"]},
        },
        "objective": [{"method": "soflow"}, {"method": "ict"}],
    }
    assert all(
        ("objective.weight_power" in point) == (point["objective"]["method"] == "soflow")
        for point in points(algorithm="random", trials=20, space=space)
    )
    grid = {**space, "objective.weight_power": {"grid": [0.5, 1.0], "when": {"objective.method": "soflow"}}}
    assert points(space=grid) == [
        {"objective.weight_power": 0.5, "objective": {"method": "soflow"}},
        {"objective.weight_power": 1.0, "objective": {"method": "soflow"}},
        {"objective": {"method": "ict"}},
    ]


def test_points_that_break_a_constraint_are_left_out() -> None:
    space = {"optimizer.warmup_steps": {"integer": [0, 100]}, "training.steps": {"integer": [1, 100]}}
    constraint = "optimizer.warmup_steps * 2 <= training.steps"
    for algorithm in ("random", "sobol"):
        drawn = points(algorithm=algorithm, trials=30, space=space, constraints=[constraint])
        assert len(drawn) == 30
        assert all(p["optimizer.warmup_steps"] * 2 <= p["training.steps"] for p in drawn)
    grid = {"optimizer.warmup_steps": [1, 2, 3], "training.steps": [2, 4]}
    assert [tuple(p.values()) for p in points(space=grid, constraints=[constraint])] == [
        (1, 2),
        (1, 4),
        (2, 4),
    ]


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("optimizer.lr < 1e-3", True),
        ("optimizer.lr * objective.weight_power > 1", False),
        ("objective.method in ['soflow', 'ict'] and not optimizer.warmup_steps % 5", True),
        ("0 < optimizer.warmup_steps <= 10", True),
        ("objective.method == 'ict' or optimizer.warmup_steps == -1", False),
        ("objective.omega > 1", True),  # none of this trial's settings
    ],
)
def test_a_constraint_is_computed_from_the_settings_of_a_trial(text: str, holds: bool) -> None:
    assert Constraint.parse(text).holds(PointSettings(FILE, {})) is holds


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "a[0] > 1",
        "lambda: a",
        "1 > 2",
        "a ** 9 > 1",
        "(" * 400,
        "a >",
        "'x' * 9",
    ],
)
def test_a_text_that_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="constraint"):
        Constraint.parse(text)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ("{space: {optimizer.lr: {uniform: [0, 1], normal: [0, 1]}}}", "a setting varies in one way"),
        ("{space: {optimizer.lr: {normal: [0, 0]}}}", "std above 0"),
        ("{space: {optimizer.lr: {choice: []}}}", "at least 1 item"),
        ("{algorithm: sobol, space: {optimizer.lr: {uniform: [0, 1]}}}", "algorithm: sobol needs `trials`"),
        (
            "{space: {optimizer.lr: {grid: [1e-4], when: {seed: 1}}, seed: {grid: [1], when: {optimizer.lr: 1e-4}}}}",
            "goes in a circle",
        ),
        ("{constraints: [optimizer.rl > 0]}", "no trial has the setting `optimizer.rl`"),
        ("{constraints: [optimizer.lr > 1]}", "search.constraints leave no point of search.space"),
        ("{constraints: [objective.method > 1]}", "cannot be computed"),
        (
            "{algorithm: random, trials: 2, constraints: [optimizer.lr > 2], space: {optimizer.lr: {uniform: [0, 1]}}}",
            "search.constraints leave 0 of",
        ),
        (
            "{seeds: 2, space: {seed: [1, 2]}}",
            "`seeds` or `final` and a `seed` that varies exclude each other",
        ),
        (
            "{asha: {first_rung: 2, metric: eval/fid_nfe1}}",
            "search.asha.metric 'eval/fid_nfe1' is never reported: this sweep reports eval/fd_nfe1",
        ),
        ("{algorithm: tpe, trials: 4}", "algorithm: tpe needs a `space`"),
        ("{algorithm: tpe, trials: 4, seeds: 2, space: {seed: [1]}}", "tpe trains each point once"),
        ("{objectives: [eval/fd_nfe2]}", "`objectives` are for algorithm: tpe"),
        (
            "{algorithm: tpe, trials: 4, objectives: [eval/fid], space: {optimizer.lr: [1e-4, 1e-3]}}",
            "search.objectives has 'eval/fid', which is never reported",
        ),
        ("{final: {best: 0}}", "greater than 0"),
        ("{seeds: 600, space: {optimizer.lr: [1e-4, 1e-3]}}", "at most 1000 trials"),
    ],
)
def test_a_space_that_cannot_be_is_refused(tmp_path: Path, search: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        trials(*reversed(read_experiment(write(tmp_path, MINIMAL), (f"search={search}",))))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_points_of_one_method_are_named_by_what_sets_them_apart(tmp_path: Path) -> None:
    space = (
        "{objective: [{method: flow_matching}, {method: meanflow}, {method: meanflow, difference: 0.05}, "
        "{method: meanflow, guidance: {drop: 0.0}}], optimizer.lr: [1e-3]}"
    )
    experiment, document = read_experiment(write(tmp_path, MINIMAL), (f"search={{space: {space}}}",))
    found = trials(document, experiment)
    assert [trial.name for trial in found] == [
        "trial-00-flow_matching-lr=0.001",
        "trial-01-meanflow-difference=0.005-drop=0.1-lr=0.001",
        "trial-02-meanflow-difference=0.05-drop=0.1-lr=0.001",
        "trial-03-meanflow-difference=0.005-drop=0-lr=0.001",
    ]
    named = named_settings(found[2].settings, experiment.search)
    assert run_name(2, named) == "meanflow difference=0.05 ... #02"


def test_every_point_is_trained_with_each_seed(tmp_path: Path) -> None:
    search = "search={seeds: 2, first: [{}], space: {objective.weight_power: [0.5]}}"
    experiment, document = read_experiment(write(tmp_path, MINIMAL), (search, "seed=5"))
    found = trials(document, experiment)
    assert [trial.name for trial in found] == [
        "trial-00-as-written-seed=5",
        "trial-01-as-written-seed=6",
        "trial-02-weight_power=0.5-seed=5",
        "trial-03-weight_power=0.5-seed=6",
    ]
    assert [trial.experiment.seed for trial in found] == [5, 6, 5, 6]
    again = Experiment(**experiment.resolved())
    assert [trial.name for trial in trials(Document(experiment.resolved()), again)] == [t.name for t in found]


def test_a_search_by_results_lists_what_it_begins_with(tmp_path: Path) -> None:
    search = "search={algorithm: tpe, trials: 12, startup: 3, first: [{}], space: {optimizer.lr: {log_uniform: [1e-4, 1e-2]}}}"
    experiment, document = read_experiment(write(tmp_path, MINIMAL), (search,))
    listed = trials(document, experiment)
    assert len(listed) == 4
    assert experiment.search.drawn == 9
    plan = plan_sweep(experiment, listed, Assumptions())
    assert any(note.startswith("up to 9 more trials come from results") for note in plan.notes)


def test_points_are_ranked_by_the_mean_over_their_seeds() -> None:
    values = {(1, 0): 2.0, (1, 1): 8.0, (2, 0): 4.0, (2, 1): 4.5, (3, 0): 1.0, (3, 1): None, (4, 0): None}
    scored = [
        ScoredTrial(f"{p}-{seed}", {"p": p, "seed": seed}, value) for (p, seed), value in values.items()
    ]
    ranked = ranked_points(scored, "min")
    assert [point.settings["p"] for point in ranked] == [2, 1, 3, 4]
    assert (ranked[0].mean, ranked[0].std) == (4.25, pytest.approx(0.5 / math.sqrt(2)))
    assert [trial.name for trial in ranked[1].trials] == ["1-0", "1-1"]
    assert [point.settings["p"] for point in ranked_points(scored, "max")] == [1, 2, 3, 4]


def test_the_gap_to_the_best_point_is_that_at_equal_seeds() -> None:
    seeds = (30.0, -10.0, 55.0, 4.0)
    trials = [
        ScoredTrial(
            f"{p}-{seed}",
            {"p": p, "seed": seed},
            None if (p, seed) == (3, 3) else 100 + effect + gap + 0.1 * (seed % 2) * (p - 1),
        )
        for p, gap in ((1, 0.0), (2, 5.0), (3, -2.0))
        for seed, effect in enumerate(seeds)
    ]
    found = gaps_to_best(ranked_points([*trials, ScoredTrial("4-0", {"p": 4, "seed": 0}, None)], "min"))
    best, second, incomplete, failed = found
    assert (best, failed) == (None, None)
    assert second == Gap(pytest.approx(5.05), pytest.approx(0.1 / math.sqrt(3)), True)
    assert incomplete is not None
    assert (incomplete.std, incomplete.decided) == (None, False)
    alone = gaps_to_best(
        ranked_points([ScoredTrial("a", {"p": 1}, 2.0), ScoredTrial("b", {"p": 2}, 5.0)], "min")
    )
    assert alone == [None, Gap(3.0, None, None)]
    assert gaps_to_best([]) == []
