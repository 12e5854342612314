"""The times of steps are searched on one seed's noise, and what is found is scored on others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from soflow_core.failures import InputError
from soflow_core.samplers.grids import check_times
from soflow_platform.cli.evaluate import parse_scales, step_search
from soflow_platform.config.sampling_settings import SamplingSection
from soflow_platform.jobs.requests import EvaluateRequest, SamplingRequest, StepSearch
from soflow_platform.jobs.score_summary import plot, summaries, varied
from soflow_platform.jobs.search_steps import FoundSteps, Grid, GridSearch, moves, search_steps
from soflow_platform.storage.project import ProjectFolder
from tests.support.scored_sweep import SWEEP, local_services, scores_of

SOFLOW, FLOW_MATCHING = f"{SWEEP}/trial-00", f"{SWEEP}/trial-01"


def found_steps(project: ProjectFolder, target: str, **sampling: Any) -> list[FoundSteps]:
    request = EvaluateRequest(target, 64, SamplingRequest(**{"steps": (2,), **sampling}))
    return search_steps(request, StepSearch(trials=12, seeds=2), local_services(project))[1]


def test_moves_keep_times_in_their_order() -> None:
    times = (0.8, 0.3)
    for moved in moves(times, 0.5):
        check_times(moved)
        assert sum(old != new for old, new in zip(times, moved, strict=True)) == 1
    assert moves((0.5,), 0.5) == [(0.75,), (0.25,)]


@pytest.mark.parametrize("best", [(0.11,), (0.62, 0.07), (0.9, 0.5, 0.42)])
def test_the_best_times_are_found_within_the_trials(best: tuple[float, ...]) -> None:
    tried = []

    def value(grids: Sequence[Grid]) -> list[float]:
        tried.extend(grids)
        return [sum((a - b) ** 2 for a, b in zip(grid.times, best, strict=True)) for grid in grids]

    even = Grid(tuple(1 - i / (len(best) + 1) for i in range(1, len(best) + 1)))
    search = GridSearch(value, lambda times: Grid(tuple(times)), trials=200)
    search.run([even])
    assert search.best.times == pytest.approx(best, abs=0.04)
    assert len(tried) == len({grid.key for grid in tried}) < 200
    short = GridSearch(value, lambda times: Grid(tuple(times)), trials=5)
    short.run([even, None, even])
    assert len(short.values) == 5


def test_a_grid_is_chosen_on_one_seed_and_scored_on_others(scored: ProjectFolder) -> None:
    (result,) = found_steps(scored, SOFLOW)
    default, found = result.at_search
    assert result.metric == "fd"
    assert found <= default
    assert result.tried == 12
    assert [(row.found.tags["labels"], row.found.seeds) for row in result.rows] == [
        ("uniform", ("1", "2")),
        ("balanced", ("1", "2")),
    ]
    for row in result.rows:
        assert row.gain == pytest.approx(row.default.values["fd"] - row.found.values["fd"])
    results = scored.root / "evaluations" / "results"
    kept = sorted(results.iterdir())
    # 12 grids under the search's seed; two under two seeds with two choices of labels.
    assert len(kept) == 12 + 8
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert found_steps(scored, SOFLOW) == [result]
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == times


def test_the_grid_found_is_a_section_of_a_sweep_file(scored: ProjectFolder) -> None:
    (result,) = found_steps(scored, FLOW_MATCHING, settings={"sampler": "heun", "sampling_scale": 2.0})
    section = SamplingSection(**yaml.safe_load(result.path.read_text())["sampling"])
    assert (section.sampler, section.guidance, section.steps) == ("heun", 2.0, 2)
    settings = {"sampler": "heun", "sampling_scale": 2.0, **result.found.settings}
    assert {key: list(v) if isinstance(v, tuple) else v for key, v in section.settings.items()} == settings
    assert result.rows[0].found.tags["nfe"] == "8"


def test_what_cannot_be_searched_is_refused(scored: ProjectFolder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one step has none: give --steps 2 or more"):
        found_steps(scored, SOFLOW, steps=(1, 2))
    with pytest.raises(InputError, match="holds images: --search-steps is for a network"):
        found_steps(scored, str(tmp_path))
    for options, message in (
        (("0.5", None, (), 3), "leave --times out"),
        ((None, Path("a.png"), (), 3), "leave --plot out"),
        ((None, None, (1.0, 2.0), 3), "takes one guidance scale"),
        ((None, None, (), 1), "give --seeds 2 or more"),
    ):
        times, picture, scales, seeds = options
        with pytest.raises(InputError, match=message):
            step_search(None, seeds, times, picture, scales)


def test_scales_seeds_and_labels_have_rows_of_their_own(scored: ProjectFolder) -> None:
    scores = scores_of(
        scored, FLOW_MATCHING, guidance=(1.0, 3.0), seeds=2, seed=4, labels="both", diversity=True
    )
    rows = summaries(scores)
    assert len(scores) == 8
    assert [(row.tags["sampling_scale"], row.tags["labels"]) for row in rows] == [
        ("1.0", "uniform"),
        ("1.0", "balanced"),
        ("3.0", "uniform"),
        ("3.0", "balanced"),
    ]
    assert varied(rows) == ["sampling_scale", "labels", "nfe"]
    assert set(rows[0].values) == {"fd", "label_agreement", "precision", "recall"}
    assert rows[0].seeds == ("4", "5")
    first, second = (score.values["fd"] for score in scores[:2])
    assert rows[0].values["fd"] == pytest.approx((first + second) / 2)
    assert rows[0].spread["fd"] == pytest.approx(abs(first - second) / 2**0.5)
    assert plot(rows).startswith(b"\x89PNG")


def test_scales_that_are_no_numbers_are_refused() -> None:
    assert parse_scales("1, 2.5,1") == (1.0, 2.5)
    with pytest.raises(InputError, match="'much' is no guidance scale"):
        parse_scales("1,much")
