"""The report of a sweep: one page without network, with the numbers of its trials and commands that reproduce them."""

from __future__ import annotations

import html
import json
import math
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from soflow_platform.config.validation import read_experiment
from soflow_platform.jobs.report import PAGE, write_report
from soflow_platform.jobs.report_charts import parallel_coordinates
from soflow_platform.jobs.report_data import gather
from soflow_platform.jobs.report_importance import importance
from soflow_platform.jobs.report_page import page
from soflow_platform.jobs.report_pareto import pareto_front
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.tuning.ranking import ScoredTrial, ranked_points
from soflow_platform.tuning.record import SweepRecord, TrialEntry, all_records
from soflow_platform.tuning.search_space import trials


@pytest.fixture
def record(scored: ProjectFolder) -> SweepRecord:
    """The finished sweep of two methods, with a name that a page must escape."""
    (record,) = all_records(scored)
    return replace(record, experiment={**record.experiment, "description": "<script>alert(1)</script>"})


def figures(text: str) -> dict[str, dict[str, object]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_the_page_needs_no_network_and_shows_every_trial(record: SweepRecord, scored: ProjectFolder) -> None:
    store = TrackingStore(scored.tracking_uri)
    written = write_report(record, scored, store)
    text = written.page.read_text(encoding="utf-8")
    own = text.replace(re.search(r"<script>.*?</script>", text, re.DOTALL)[0], "")  # type: ignore[index]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", own)
    assert "default-src 'none'" in text
    assert "<script>alert(1)" not in own
    assert "&lt;script&gt;alert(1)" in own
    for trial in record.trials:
        assert html.escape(trial.name) in own
    assert set(figures(own)) == {
        "against-images",
        "against-seconds",
        "parallel-coordinates",
        "schedules",
    }
    assert len(figures(own)["against-images"]["data"]) == 2  # type: ignore[arg-type]
    assert own.count("data:image/png;base64,") == 4
    assert "2 scored trials are too few" in own
    assert written.not_logged is None
    logged = store.client.list_artifacts(record.run or "", "report")
    assert sorted(Path(each.path).name for each in logged) == ["report.html", "reproduce.yaml"]


def test_a_front_has_the_trials_that_no_other_beats_in_both() -> None:
    values = [(3.0, 1.0), (1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (math.nan, 0.0), (2.5, 4.0), (1.0, 5.0)]
    assert pareto_front(values, ("min", "min")) == [1, 6, 2, 0]
    assert pareto_front(values, ("min", "max")) == [1, 6, 3]
    assert pareto_front([], ("min", "min")) == []
    generator = random.Random(0)
    drawn = [(generator.random(), generator.random()) for _ in range(60)]
    beaten = [any(a <= x and b <= y and (a, b) != (x, y) for a, b in drawn) for x, y in drawn]
    assert sorted(pareto_front(drawn, ("min", "min"))) == [i for i, lost in enumerate(beaten) if not lost]


def test_several_objectives_are_shown_with_their_front(record: SweepRecord, scored: ProjectFolder) -> None:
    space = {"optimizer.lr": {"uniform": [1e-4, 1e-3]}}
    search = {**record.experiment["search"], "algorithm": "tpe", "trials": 2, "space": space}
    search["objectives"] = ["eval/fd_nfe2", "train_seconds"]
    several = replace(record, experiment={**record.experiment, "search": search})
    text = write_report(several, scored, TrackingStore(scored.tracking_uri)).page.read_text(encoding="utf-8")
    drawn = figures(text)
    assert {"pareto-0", "pareto-1"} <= set(drawn)
    shown = [len(trace["x"]) for trace in drawn["pareto-1"]["data"]]  # type: ignore[index, attr-defined]
    assert sum(shown) == 2
    assert shown[1] >= 1


def test_the_command_of_a_trial_stands_for_the_same_training(
    record: SweepRecord, scored: ProjectFolder, tmp_path: Path
) -> None:
    write_report(record, scored, TrackingStore(scored.tracking_uri), tmp_path)
    report = gather(record, scored, TrackingStore(scored.tracking_uri), str(tmp_path / "reproduce.yaml"))
    assert len(report.trials) == 2
    for trial in report.trials:
        words = shlex.split(trial.command)
        assert words[:2] == ["soflowctl", "run"]
        experiment, document = read_experiment(Path(words[2]), tuple(words[4::2]))
        (again,) = trials(document, experiment)
        same = {"name", "search", "description", "registry"}
        assert again.experiment.model_dump(exclude=same) == trial.trial.experiment.model_dump(exclude=same)


def test_the_ranking_is_that_of_the_best_evaluations(record: SweepRecord, scored: ProjectFolder) -> None:
    report = gather(record, scored, TrackingStore(scored.tracking_uri), "reproduce.yaml")
    values = [min(e[record.metric] for e in trial.evaluations) for trial in report.scored]
    assert values == sorted(values)
    assert [point.mean for point in report.ranked] == values
    for trial in report.trials:
        costs = [trial.seconds_at(step) or 0.0 for step in (1, 3, 6)]
        assert 0 < costs[0] < costs[1] < costs[2]
        assert trial.cost == costs[2]


def test_a_setting_that_no_scored_trial_has_is_no_axis(record: SweepRecord, scored: ProjectFolder) -> None:
    first, second = record.trials
    clipped = TrialEntry("trial-02", {**first.settings, "training.clip_norm": 1.0}, first.steps)
    store = TrackingStore(scored.tracking_uri)
    report = gather(replace(record, trials=[first, second, clipped]), scored, store, "my page/reproduce.yaml")
    assert report.varied()["training.clip_norm"] == [None, None, 1.0]
    chart = parallel_coordinates(report)
    assert chart is not None
    assert "training.clip_norm" not in chart.layout.xaxis.ticktext
    assert shlex.split(report.trials[2].command)[2] == "my page/reproduce.yaml"


def test_a_method_that_is_the_files_own_is_shown_by_its_name_alone(
    record: SweepRecord, scored: ProjectFolder
) -> None:
    """What other columns vary of it would stand in every row, among all that nobody varied."""
    first, second = record.trials
    own = replace(second, settings={"objective.weight_power": 0.5})
    guided = {"method": "meanflow", "guidance": {"omega": 0.75}}
    report = gather(
        replace(record, trials=[replace(first, settings={"objective": guided}), own]),
        scored,
        TrackingStore(scored.tracking_uri),
        "reproduce.yaml",
    )
    assert report.varied()["objective"] == ["meanflow (omega 0.75)", "soflow"]


def test_a_report_is_written_where_the_tracking_store_is_away(
    record: SweepRecord, scored: ProjectFolder, tmp_path: Path
) -> None:
    (scored.root / "mlflow.db").write_bytes(b"no database")
    written = write_report(record, scored, TrackingStore(scored.tracking_uri), tmp_path)
    assert written.not_logged is not None
    assert "could not be read" in (tmp_path / PAGE).read_text(encoding="utf-8")


def test_the_setting_that_decides_has_the_largest_share() -> None:
    columns = {
        "decides": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
        "method": ["a", "b", "b", "a", "a", "b", "b", "a"],
        "nothing": [1] * 8,
        "sometimes": [None, *[2] * 6, 3],
    }
    values = [
        10 * value**2 + (name == "a") / 10
        for value, name in zip(columns["decides"], columns["method"], strict=True)
    ]  # type: ignore[operator]
    shares = importance(columns, values)
    assert isinstance(shares, dict)
    assert list(shares) == ["decides", "method"]
    assert shares["decides"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    assert importance(columns, [float("nan"), *values[:2], *[float("inf")] * 5]).startswith("2 scored trials")  # type: ignore[union-attr]
    assert importance({"nothing": [1] * 8}, values) == "no setting that every trial has takes several values."


def test_a_sweep_with_seeds_says_how_far_each_point_is_from_the_best(
    record: SweepRecord, scored: ProjectFolder
) -> None:
    """The two trials stand for two points of four seeds each, which move both of them more than they differ."""
    report = gather(record, scored, TrackingStore(scored.tracking_uri), "reproduce.yaml")
    points = [
        ScoredTrial(trial.name, {"p": place, "seed": seed}, 50.0 + 10 * seed + place * (5 + seed % 2))
        for place, trial in enumerate(report.trials)
        for seed in range(4)
    ]
    text = page(replace(report, ranked=ranked_points(points, "min")), "name: digits\n")
    assert ">to the best</th>" in text
    assert ">+5.5 ± 0.58, decided</td>" in text
    alone = page(report, "name: digits\n")
    assert "to the best" not in alone
