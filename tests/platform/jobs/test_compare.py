"""A comparison has the scores that its methods have alone, their costs, and conclusions that follow from its rows."""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import Diffusion, FlowMatching, SoFlow
from soflow_pipelines.sources.digits import load_digits
from soflow_platform.cli.compare import CopiesRequest, find_request, find_requests
from soflow_platform.config.comparison import SamplingConfig
from soflow_platform.config.document import apply_override, read_document
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import validate
from soflow_platform.errors import JobError, UserError
from soflow_platform.evaluation.protocol import ScoringProtocol
from soflow_platform.jobs.benchmark import (
    Costs,
    SamplingBenchmark,
    TimedTraining,
    TrainingBenchmark,
    measure_costs,
    measure_sampling,
    measure_training,
)
from soflow_platform.jobs.compare import ScoredSweep, TrainingKey, score_sweep
from soflow_platform.jobs.compare_report import conclusions, markdown, page_with, save, table
from soflow_platform.jobs.compare_rows import Comparison, Row
from soflow_platform.jobs.evaluate import Score, ScoringTask, Services, score_all
from soflow_platform.jobs.model_under_test import ModelUnderTest
from soflow_platform.jobs.requests import CompareRequest
from soflow_platform.jobs.targets import find_target
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.tuning.record import SweepRecord, load_record
from tests.support.scored_sweep import ROOT, SETTINGS, SWEEP, local_services, scores_of

TINY = DiTConfig(
    channels=1, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=10, null_label=True
)


@pytest.fixture
def record(scored: ProjectFolder) -> SweepRecord:
    found = load_record(scored, SWEEP)
    assert found is not None
    return found


def scored_sweep(project: ProjectFolder, record: SweepRecord, *ways: SamplingConfig) -> ScoredSweep:
    """The sweep, sampled in these ways or in those of its own `comparison`."""
    request = CompareRequest(record, ways or Experiment(**record.experiment).comparison)
    return score_sweep(request, local_services(project), print)


def compared(project: ProjectFolder, record: SweepRecord, *ways: SamplingConfig) -> Comparison:
    return scored_sweep(project, record, *ways).comparison()


def test_trials_of_several_sweeps_stand_in_one_table_each_training_once(
    scored: ProjectFolder, record: SweepRecord
) -> None:
    # The second sweep has one of the first one's trainings, and another seed's of the other.
    other = replace(record, id="digits-11111111", created=record.created + 1)
    entries = [record.trials[0], replace(record.trials[1], settings={**record.trials[1].settings, "seed": 1})]
    replace(other, trials=entries).save(scored)
    for entry in entries:
        shutil.copytree(scored.trial(SWEEP, entry.name), scored.trial(other.id, entry.name))
    request = find_requests((SWEEP, other.id), (), scored)
    found = score_sweep(request, local_services(scored), print).comparison()
    one = compared(scored, record)
    assert found.sweep == f"{SWEEP} + {other.id}"
    assert [row.trial for row in found.rows] == [
        *(f"{SWEEP}/{row.trial}" for row in one.rows),
        *[f"{other.id}/trial-01-flow_matching"] * 3,
    ]
    assert found.left_out == [
        f"{other.id}/trial-00-soflow is the training of {SWEEP}/trial-00-soflow, which is in the table"
    ]
    assert [row.distance for row in found.rows[:5]] == [row.distance for row in one.rows]
    assert {row.label(found.rows) for row in found.rows if row.method == "soflow"} == {"soflow"}
    assert f"{SWEEP}/trial-01-flow_matching" in {row.label(found.rows) for row in found.rows}


def test_where_each_method_is_trained_again_with_its_own_setting_those_trials_alone_are_compared(
    scored: ProjectFolder, record: SweepRecord
) -> None:
    chosen = record.trials[1]
    settings = {**chosen.settings, "optimizer.lr": record.experiment["optimizer"]["lr"]}
    record.trials[1] = replace(chosen, settings=settings, phase="final")
    record.experiment["search"]["space"]["optimizer.lr"] = [1e-3]
    record.experiment["search"]["final"] = {"best": 1, "seeds": 1}
    both = compared(scored, record, SamplingConfig(steps=(1,)))
    assert [row.method for row in both.rows] == ["soflow", "flow_matching"]
    record.experiment["search"]["final"]["of_each"] = "objective"
    found = compared(scored, record, SamplingConfig(steps=(1,)))
    assert found.rows == both.rows[1:]
    assert found.rows[0].varied == "optimizer.lr 0.001"
    (sentence,) = found.left_out
    assert sentence.startswith(f"the 1 trial(s) of {SWEEP}'s search, by whose scores settings were chosen")
    text = markdown(found)
    assert f"- left out: {sentence}" in text
    assert "- settings of the trials: flow_matching: optimizer.lr 0.001" in text


def test_sweeps_that_are_scored_otherwise_are_not_compared(
    scored: ProjectFolder, record: SweepRecord
) -> None:
    evaluation = {**record.experiment["evaluation"], "samples": 90}
    replace(record, id="digits-22222222", experiment={**record.experiment, "evaluation": evaluation}).save(
        scored
    )
    with pytest.raises(UserError, match=r"has evaluation.samples 100 and digits-22222222 has 90"):
        score_sweep(find_requests((SWEEP, "digits-22222222"), (), scored), local_services(scored), print)
    with pytest.raises(UserError, match=r"is named twice"):
        find_requests((SWEEP, SWEEP), (), scored)
    with pytest.raises(UserError, match=r"--set is of one sweep file"):
        find_requests((SWEEP, "digits-22222222"), ("seed=1",), scored)


def test_every_method_is_sampled_in_every_way_that_covers_it(
    scored: ProjectFolder, record: SweepRecord
) -> None:
    rows = compared(scored, record).rows
    assert [(r.method, r.sampling, r.steps, r.nfe, r.samples) for r in rows] == [
        ("soflow", "", 1, 1, 100),
        ("soflow", "", 2, 2, 100),
        ("flow_matching", "euler", 1, 1, 100),
        ("flow_matching", "euler", 2, 2, 100),
        ("flow_matching", "euler, guidance 2", 2, 4, 80),
    ]
    assert {(r.budget, r.trained_steps, r.uses_jvp) for r in rows} == {("steps", 6, False)}
    assert [r.flags for r in rows[:4]] == [()] * 4
    (flag,) = rows[4].flags
    assert "is scored on 80 samples, where 100 are usual" in flag


def test_times_and_samplers_are_compared_on_one_trial(scored: ProjectFolder, record: SweepRecord) -> None:
    ways = [
        SamplingConfig(methods=("soflow",), steps=(2,), sampler=sampler, sampling_times=times)
        for sampler, times in ((None, (0.5,)), ("ode", None), ("ode", (0.25,)))
    ]
    rows = [row for row in compared(scored, record, *ways).rows if row.method == "soflow"]
    assert [row.sampling for row in rows] == ["times 0.5", "ode", "ode, times 0.25"]
    assert len({row.distance for row in rows}) == 3


def test_other_labels_have_rows_of_their_own_and_decide_nothing(
    scored: ProjectFolder, record: SweepRecord
) -> None:
    drawn = SamplingConfig(methods=("soflow",), steps=(1,), labels="uniform")
    found = compared(scored, record, drawn, SamplingConfig(steps=(1,)))
    assert [(row.method, row.sampling, row.labels) for row in found.rows] == [
        ("soflow", "uniform labels", "uniform"),
        ("soflow", "", None),
        ("flow_matching", "euler", None),
    ]
    (score,) = scores_of(scored, str(newest(scored, "trial-00-soflow")), num=100, labels="uniform")
    assert found.rows[0].distance == score.values["fd"] != found.rows[1].distance
    assert found.settings["labels"] == "balanced"
    without = replace(found, rows=found.rows[1:])
    assert conclusions(found) == conclusions(without)


def newest(project: ProjectFolder, trial: str) -> Path:
    return project.trial(SWEEP, trial) / "checkpoints" / "step-00000006"


def test_a_row_has_the_score_that_evaluate_gives(scored: ProjectFolder, record: SweepRecord) -> None:
    newest = scored.trial(SWEEP, "trial-01-flow_matching") / "checkpoints" / "step-00000006"
    row = compared(scored, record).rows[-1]
    (score,) = scores_of(
        scored, str(newest), num=80, steps=(2,), labels="balanced", settings={"sampling_scale": 2.0}
    )
    assert (row.distance, row.label_agreement) == (score.values["fd"], score.values["label_agreement"])


def test_a_sweep_with_a_reference_of_its_own_is_compared_with_that(
    scored: ProjectFolder, record: SweepRecord, tmp_path: Path
) -> None:
    folder = tmp_path / "real"
    folder.mkdir()
    for number, image in enumerate(load_digits().images[:200, 0]):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    record.experiment["evaluation"]["reference"] = str(folder)
    found = compared(scored, record, SamplingConfig(steps=(1,)))
    path = str(newest(scored, "trial-00-soflow"))
    (score,) = scores_of(scored, path, labels="balanced", reference=str(folder))
    assert found.settings["reference_samples"] == "200"
    assert found.rows[0].distance == score.values["fd"]


def test_images_that_are_refused_leave_the_other_rows(
    scored: ProjectFolder, record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(tasks: Sequence[ScoringTask], protocol: ScoringProtocol, services: Services) -> list[Score]:
        if any("flow_matching" in task.name for task in tasks):
            raise UserError("image 3 that these weights make is not finite.")
        return score_all(tasks, protocol, services)

    monkeypatch.setattr("soflow_platform.jobs.compare.score_all", refusing)
    found = compared(scored, record, SamplingConfig(steps=(1,)))
    assert [row.method for row in found.rows] == ["soflow"]
    (sentence,) = found.left_out
    assert re.search(r"trial-01-flow_matching at step 6 in 1 step\(s\): image 3 .* not finite$", sentence)
    with pytest.raises(UserError, match="is not finite"):
        compared(scored, record, SamplingConfig(methods=("flow_matching",), steps=(1,)))


def test_scores_are_logged_on_the_runs_of_their_trials(scored: ProjectFolder, record: SweepRecord) -> None:
    rows = compared(scored, record).rows
    runs = {
        run.data.tags["soflow.trial"]: run.data.metrics
        for run in TrackingStore(scored.tracking_uri).client.search_runs([record.experiment_id or ""])
        if "soflow.trial" in run.data.tags
    }
    assert runs["trial-00-soflow"]["evaluate/fd100_nfe2_balanced"] == rows[1].distance
    assert runs["trial-01-flow_matching"]["evaluate/fd80_nfe4_balanced"] == rows[4].distance


def test_ways_that_differ_in_samples_are_scored_and_equal_ones_once(
    scored: ProjectFolder, record: SweepRecord
) -> None:
    few = SamplingConfig(methods=("flow_matching",), steps=(1,), samples=64)
    again = SamplingConfig(methods=("flow_matching",), steps=(1,), samples=100)
    rows = compared(scored, record, SamplingConfig(steps=(1,)), few, few, again).rows
    assert [(r.method, r.samples) for r in rows] == [
        ("soflow", 100),
        ("flow_matching", 100),
        ("flow_matching", 64),
    ]
    assert rows[1].distance != rows[2].distance


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        (("evaluations",), [("evaluations", "soflow"), ("evaluations", "flow_matching")]),
        (
            ("steps", "evaluations"),
            [("steps", "soflow"), ("steps", "flow_matching"), ("evaluations", "soflow")],
        ),
    ],
)
def test_a_row_is_in_the_table_of_every_budget_of_its_trial(
    scored: ProjectFolder, record: SweepRecord, budgets: tuple[str, ...], expected: list[tuple[str, str]]
) -> None:
    record.experiment["search"]["budgets"] = budgets
    if len(budgets) > 1:
        for place, of in enumerate(("steps, evaluations", "steps")):
            entry = record.trials[place]
            name, settings = f"{entry.name}-equal-steps", {**entry.settings, "budget": of}
            scored.trial(SWEEP, entry.name).rename(scored.trial(SWEEP, name))
            record.trials[place] = replace(entry, name=name, settings=settings)
        record.trials.append(replace(record.trials[1], name="trial-02", settings={"budget": "evaluations"}))
    found = compared(scored, record, SamplingConfig(steps=(1,)))
    assert [(r.budget, r.method) for r in found.rows] == expected
    assert found.budgets == list(budgets)
    assert ("## Equal training steps" in markdown(found)) == ("steps" in budgets)


def test_a_model_under_test_holds_no_weights(scored: ProjectFolder, record: SweepRecord) -> None:
    name = record.trials[0].name
    path = find_target(f"{SWEEP}/{name}", scored, TrackingStore(scored.tracking_uri)).weights
    assert path is not None
    assert len(pickle.dumps(ModelUnderTest.open(path, {}))) < path.stat().st_size / 4


def test_a_failure_of_the_benchmarks_leaves_the_scores(
    scored: ProjectFolder, record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = scored_sweep(scored, record)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(JobError, match=r"could not be measured: .*; the table is kept without them"):
        found.with_costs()
    assert [row.nfe for row in found.comparison().rows] == [1, 2, 1, 2, 4]
    assert found.comparison().device is None


def test_each_row_has_the_costs_of_its_training_and_its_sampling(
    scored: ProjectFolder, record: SweepRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(trainings: Sequence[TrainingBenchmark], samplings: Sequence[SamplingBenchmark]) -> Costs:
        methods = [each.experiment.objective.method for each in trainings]
        assert methods == ["soflow", "flow_matching"]
        assert [(each.objective.method, each.steps) for each in samplings] == [
            ("soflow", 1),
            ("soflow", 2),
            ("flow_matching", 1),
            ("flow_matching", 2),
            ("flow_matching", 2),
            ("diffusion", 1000),
        ]
        return Costs("cpu", 1, [1.0, 2.0], [10.0, 20.0], [0.1, 0.2, 0.3, 0.4, 0.5, 600.0])

    monkeypatch.setattr("soflow_platform.jobs.compare.measure_costs", measure)
    table = scored_sweep(scored, record).with_costs().comparison()
    assert table.device == "cpu"
    assert [(r.step_seconds, r.peak_bytes, r.image_seconds) for r in table.rows] == [
        (1.0, 10.0, 0.1),
        (1.0, 10.0, 0.2),
        (2.0, 20.0, 0.3),
        (2.0, 20.0, 0.4),
        (2.0, 20.0, 0.5),
    ]
    assert table.rows[0].speedup == pytest.approx(6000)


def test_trainings_that_differ_in_seed_and_learning_rate_are_timed_once(record: SweepRecord) -> None:
    experiment = Experiment(**record.experiment)
    keys = {
        TrainingKey.of(TrainingBenchmark(TINY, experiment.model_copy(update=update)))
        for update in ({}, {"seed": 3}, {"optimizer": replace(experiment.optimizer, lr=1e-4)})
    }
    assert len(keys) == 1
    other = experiment.model_copy(update={"objective": FlowMatching()})
    assert TrainingKey.of(TrainingBenchmark(TINY, other)) not in keys


def test_a_failing_benchmark_without_a_message_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(JobError, match="the benchmark process failed without an error message"):
        measure_costs([], [])


def test_a_killed_benchmark_is_reported_with_its_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\necho a word of something else >&2\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(killed))
    with pytest.raises(JobError, match=r"^the costs could not be measured: ended by signal 9$"):
        measure_costs([], [])


def test_a_short_trial_is_flagged_and_one_without_weights_left_out(
    scored: ProjectFolder, record: SweepRecord
) -> None:
    for name in ("step-00000006", "step-00000004"):
        (scored.trial(SWEEP, "trial-00-soflow") / "checkpoints" / name / "checkpoint.json").unlink()
    for folder in (scored.trial(SWEEP, "trial-01-flow_matching") / "checkpoints").iterdir():
        (folder / "checkpoint.json").unlink()
    found = compared(scored, record)
    assert {row.trained_steps for row in found.rows} == {2}
    assert found.rows[0].flags[0] == "trial-00-soflow is at step 2 of 6: it has not had its budget."
    assert found.left_out == [f"trial trial-01-flow_matching of sweep {SWEEP} has no checkpoint yet"]
    assert found.left_out[0] in markdown(found)


def test_a_sweep_file_decides_how_its_sweep_is_sampled(scored: ProjectFolder, record: SweepRecord) -> None:
    assert find_request(SWEEP, (), scored) == CompareRequest(
        record, Experiment(**record.experiment).comparison
    )
    with pytest.raises(UserError, match="is one trial: name its sweep"):
        find_request("trial-00-soflow", (), scored)
    with pytest.raises(UserError, match="as it stands has not run under"):
        find_request("digits", ("seed=5",), scored)


def test_the_comparison_section_does_not_change_the_digest(record: SweepRecord) -> None:
    experiment = Experiment(**record.experiment)
    other = experiment.model_copy(update={"comparison": (SamplingConfig(steps=(32,)),)})
    assert other.digest() == experiment.digest()


def row(method: str, nfe: int, distance: float, budget: str = "steps", jvp: bool = False) -> Row:
    return Row(budget, f"trial-{method}", method, jvp, 600, "", nfe, nfe, 2000, distance, None)


def comparison(*rows: Row) -> Comparison:
    return Comparison("methods-0", "fd", list(rows), {"features": "digits-cnn-1"}, None)


def test_the_claim_holds_where_soflow_has_the_best_distance() -> None:
    holds = comparison(
        row("meanflow", 1, 9.0, jvp=True), row("soflow", 1, 8.0), row("flow_matching", 1, 90.0)
    )
    assert conclusions(holds) == [
        "equal steps, 1 NFE: the best is soflow, without a Jacobian-vector product, fd 8.",
        "equal steps, 1 NFE: that SoFlow has the best distance holds (fd 8).",
    ]


def test_the_claim_does_not_hold_where_another_is_better() -> None:
    fails = comparison(
        row("meanflow", 1, 7.0, jvp=True),
        row("soflow", 1, 8.0),
        row("shortcut", 1, 7.5),
        row("flow_matching", 32, 3.0),
    )
    assert conclusions(fails) == [
        "equal steps, 1 NFE: the best is meanflow, with a Jacobian-vector product, fd 7.",
        "equal steps, 1 NFE: the best without a Jacobian-vector product is shortcut, fd 7.5.",
        "equal steps, 1 NFE: that SoFlow has the best distance does not hold: it is 3 of 3 (fd 8).",
        "equal steps, any NFE: the best is flow_matching at 32 NFE, fd 3.",
    ]


def test_methods_are_ranked_among_those_of_the_same_guidance() -> None:
    guided, plain = replace(row("soflow", 1, 8.0), trained_guidance=3.0), row("soflow", 1, 7.0)
    plain = replace(plain, trial="trial-soflow-plain", trained_guidance=1.0)
    table = comparison(
        guided, plain, row("ict", 1, 6.0), replace(row("meanflow", 1, 9.0), trained_guidance=3.0)
    )
    assert conclusions(table) == [
        "equal steps, 1 NFE, no guidance: the best is ict, without a Jacobian-vector product, fd 6.",
        "equal steps, 1 NFE, no guidance: that SoFlow has the best distance does not hold: it is 2 of 2 (fd 7).",
        "equal steps, 1 NFE, guidance 3 in training: the best is soflow, without a Jacobian-vector product, fd 8.",
        "equal steps, 1 NFE, guidance 3 in training: that SoFlow has the best distance holds (fd 8).",
    ]
    assert [r.label(table.rows) for r in table.rows] == [
        "soflow, guidance 3",
        "soflow, no guidance",
        "ict",
        "meanflow",
    ]
    twin = replace(plain, trial="trial-soflow-twin")
    assert plain.label([plain, twin]) == "trial-soflow-plain"


def test_each_budget_is_ranked_by_its_own_rows() -> None:
    both = comparison(
        row("soflow", 1, 8.0),
        row("meanflow", 1, 9.0, jvp=True),
        row("soflow", 1, 8.0, "evaluations"),
        row("meanflow", 1, 5.0, "evaluations", jvp=True),
    )
    sentences = conclusions(both)
    assert sentences[1].endswith("holds (fd 8).")
    assert sentences[4].endswith("does not hold: it is 2 of 2 (fd 8).")


def seeds(method: str, *distances: float, jvp: bool = False) -> list[Row]:
    """One row for each seed of a method at one evaluation."""
    rows = [row(method, 1, distance, jvp=jvp) for distance in distances]
    return [
        replace(each, trial=f"trial-{number:02d}-{method}-seed={number}", point=method)
        for number, each in enumerate(rows)
    ]


def test_seeds_of_one_point_are_one_row_with_their_mean_and_spread() -> None:
    found = comparison(*seeds("soflow", 7.0, 8.0, 9.0), row("ict", 1, 20.0))
    averaged, alone = found.of("steps")
    assert (averaged.distance, averaged.spread, averaged.seeds) == (8.0, 1.0, 3)
    assert averaged.trial == "trial-00-soflow"
    assert (alone.distance, alone.spread, alone.seeds) == (20.0, None, 1)
    text = markdown(found)
    assert "| soflow | no | - | 600 | 1 | 8 ± 1 |" in text
    assert "- seeds: 1, 3; numbers are means over them" in text
    assert len(list(csv.DictReader(io.StringIO(table(found))))) == 4


def test_a_page_has_one_block_for_the_sweeps_of_these_names_and_keeps_the_rest() -> None:
    first, second = comparison(row("soflow", 1, 8.0)), comparison(row("soflow", 1, 7.0))
    first = replace(first, settings={**first.settings, "reference": "/somewhere/data/digits"})
    second = replace(second, settings=first.settings)
    page = page_with("# Methods\n\nText.\n", first, "digits", None)
    page = page_with(f"{page}\nMore text.\n", first, "latents", "pictures/latents.png")
    before, _, rest = page.partition("<!-- written by soflowctl compare digits -->")
    assert before == "# Methods\n\nText.\n\n"
    assert "\nMore text.\n\n<!-- written by soflowctl compare latents -->" in rest
    assert (
        "![fd against function evaluations](pictures/latents.png)\n\n<!-- until here: latents -->\n" in rest
    )
    assert "### Equal training steps" in rest
    assert "- reference: digits\n" in page
    # The same sweeps again, in the place where they are.
    again = page_with(page, second, "digits", None)
    assert again == page.replace("| 8 |", "| 7 |", 1).replace("fd 8.", "fd 7.", 1).replace(
        "(fd 8)", "(fd 7)", 1
    )
    with pytest.raises(ValueError, match="it has one of the lines"):
        page_with(page.replace("<!-- until here: digits -->", ""), first, "digits", None)


def test_the_files_of_a_comparison_are_refused_before_anything_is_scored(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"--markdown .*page.txt: give a file FILE.md in a folder that exists"
    ):
        CopiesRequest(tmp_path / "page.txt").check()
    with pytest.raises(UserError, match=r"--plot .*: give a file FILE.png in a folder that exists"):
        CopiesRequest(None, tmp_path / "nowhere" / "plot.png").check()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"--plot .*: give a file FILE.png in a folder that exists"):
        CopiesRequest(None, tmp_path / "folder.png").check()
    plot = tmp_path / "own.png"
    plot.write_bytes(b"png")
    (tmp_path / "pictures").mkdir()
    copies = CopiesRequest(tmp_path / "page.md", tmp_path / "pictures" / "plot.png")
    copies.check()
    copies.write(comparison(row("soflow", 1, 8.0)), "digits", plot)
    assert "](pictures/plot.png)" in (tmp_path / "page.md").read_text()
    assert (tmp_path / "pictures" / "plot.png").read_bytes() == b"png"


def test_the_best_at_any_number_is_of_equal_samples_and_said_to_be_decided_or_not() -> None:
    several = [replace(each, steps=50, nfe=50) for each in seeds("flow_matching", 5.0, 6.0, 7.0)]
    few = replace(row("diffusion", 1000, 1.0), flags=("scored on few samples",))
    near = comparison(*several, *seeds("soflow", 5.5, 6.5, 7.5), few)
    assert conclusions(near)[-1] == (
        "equal steps, any NFE: the best is flow_matching at 50 NFE, fd 6 ± 1, not decidedly before soflow (6.5 ± 1)."
    )
    far = comparison(*several, *seeds("soflow", 15.0, 16.0, 17.0), few)
    assert conclusions(far)[-1] == "equal steps, any NFE: the best is flow_matching at 50 NFE, fd 6 ± 1."


def test_an_order_within_the_spread_over_seeds_is_not_decided() -> None:
    near = comparison(*seeds("meanflow", 7.0, 8.0, 9.0, jvp=True), *seeds("soflow", 7.5, 8.5, 9.5))
    assert conclusions(near) == [
        "equal steps, 1 NFE: the best is meanflow, with a Jacobian-vector product, fd 8 ± 1, not decidedly before "
        "soflow (8.5 ± 1).",
        "equal steps, 1 NFE: the best without a Jacobian-vector product is soflow, fd 8.5 ± 1.",
        "equal steps, 1 NFE: that SoFlow has the best distance is not decided: it is 2 of 2, and the best is within the spread "
        "over seeds (fd 8.5 ± 1).",
    ]
    far = comparison(*seeds("soflow", 7.0, 8.0, 9.0), *seeds("ict", 17.0, 18.0, 19.0))
    assert conclusions(far)[1].endswith("has the best distance holds (fd 8 ± 1).")
    beaten = comparison(*seeds("soflow", 17.0, 18.0, 19.0), *seeds("ict", 7.0, 8.0, 9.0))
    assert conclusions(beaten)[1].endswith("does not hold: it is 2 of 2 (fd 18 ± 1).")


def test_the_report_has_every_row_as_table_csv_json_and_plot(tmp_path: Path) -> None:
    costly = replace(
        row("soflow", 2, 8.0),
        step_seconds=0.1234,
        peak_bytes=82.25e6,
        image_seconds=5.67e-4,
        speedup=543.2,
        steps=1,
        sampling="guidance 3",
    )
    found = comparison(costly, row("meanflow", 1, 9.0, "evaluations", jvp=True))
    paths = save(found, tmp_path)
    assert [path.name for path in paths] == [
        "comparison.md",
        "comparison.csv",
        "comparison.json",
        "comparison.png",
    ]
    text = (tmp_path / "comparison.md").read_text()
    assert "| soflow | no | guidance 3 | 600 | 2 (1 x 2) | 8 | - | 0.123 | 82.2 | 0.567 | 543 |" in text
    assert "| meanflow | yes | - | 600 | 1 | 9 | - | - | - | - | - |" in text
    assert text.index("## Equal training steps") < text.index("## Equal network evaluations in training")
    read = list(csv.DictReader(io.StringIO(table(found))))
    assert [(r["method"], r["nfe"], r["distance"], r["uses_jvp"]) for r in read] == [
        ("soflow", "2", "8.0", "False"),
        ("meanflow", "1", "9.0", "True"),
    ]
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["speedup"] == 543.2
    assert Image.open(tmp_path / "comparison.png").size[0] > 800


def trained(method: str, *overrides: str) -> TrainingBenchmark:
    """A small network on the digits, trained as a sweep file says."""
    document = read_document(ROOT / "sweeps" / "digits.yaml")
    for override in (*SETTINGS, f"objective={{method: {method}}}", "training.batch=64", *overrides):
        apply_override(document, override)
    return TrainingBenchmark(TINY, validate(document))


def test_costs_are_measured_with_the_settings_of_the_trial() -> None:
    settings = (
        "training.accumulate=2",
        "training.clip_norm=0.5",
        "training.deterministic=true",
        "training.ema=[0.9, 0.99]",
        "training.precision=bfloat16",
        "resources.workers=4",
        "optimizer.name=radam",
    )
    timed = TimedTraining(trained("soflow", *settings), torch.device("cpu"))
    step = timed.step
    config = step.config
    assert (config.accumulate, config.clip_norm, config.deterministic, config.compile) == (
        2,
        0.5,
        True,
        False,
    )
    assert (step.policy.precision, len(step.ema.state_dict())) == ("bfloat16", 2)
    assert isinstance(step.optimizer, torch.optim.RAdam)
    rows: list[int] = []
    step.module.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    assert timed(0) > 0
    # A worker's 16 of 64 samples, in two pieces.
    assert max(rows) < 16


def test_benchmarks_hold_one_network_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[DiT] = weakref.WeakSet()
    most: list[int] = []
    make = DiT.__init__

    def counted(self: DiT, *settings: Any) -> None:
        make(self, *settings)
        alive.add(self)
        most.append(len(alive))

    monkeypatch.setattr(DiT, "__init__", counted)
    here = torch.device("cpu")
    seconds, peaks = measure_training([trained("soflow"), trained("shortcut")], here)
    wide = replace(TINY, hidden=32)
    images = measure_sampling(
        [SamplingBenchmark(TINY, SoFlow(), 1), SamplingBenchmark(wide, FlowMatching(), 2)], here
    )
    assert all(value > 0 for value in (*seconds, *peaks, *images))
    assert len(most) == 2 * (2 + 1) + 2 * 2
    assert set(most) == {1}


def test_sampling_time_excludes_drawing_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: Any) -> None:
        raise AssertionError("noise was drawn")

    monkeypatch.setattr("soflow_core.samplers.noise.random_words", draw)
    (seconds,) = measure_sampling(
        [SamplingBenchmark(TINY, Diffusion(sampler="ddpm"), 20)], torch.device("cpu")
    )
    assert seconds > 0


@pytest.mark.slow
def test_peak_memory_follows_the_method_and_the_batch() -> None:
    found = measure_costs(
        [
            trained("flow_matching"),
            trained("soflow"),
            trained("scm"),
            trained("meanflow"),
            trained("flow_matching", "training.batch=256"),
            trained("flow_matching", "training.batch=256", "training.accumulate=4"),
        ],
        [
            SamplingBenchmark(TINY, SoFlow(), 1),
            SamplingBenchmark(TINY, FlowMatching(), 40),
            SamplingBenchmark(TINY, Diffusion(sampler="ddpm"), 200),
        ],
    )
    assert found.threads == 1
    assert len(found.image_seconds) == 3
    assert all(seconds > 0 for seconds in (*found.image_seconds, *found.step_seconds))
    matching, _, consistency, _, large, pieces = found.peak_bytes
    # Four times the batch has more activations; the tangents of a Jacobian-vector product are tensors too.
    assert matching < consistency < large
    assert pieces < large
    again = measure_costs([trained("flow_matching")], [])
    assert again.peak_bytes == [matching]


def test_methods_are_compared_seed_by_seed_where_they_have_the_same_seeds() -> None:
    """Seeds move a distance by 20, and one method is better by 5 under each of them."""
    one = [replace(each, seed=place) for place, each in enumerate(seeds("soflow", 80.0, 100.0, 120.0, 90.0))]
    other = [replace(each, seed=place) for place, each in enumerate(seeds("ict", 85.0, 105.5, 125.0, 94.5))]
    assert conclusions(comparison(*one, *other))[1].endswith("has the best distance holds (fd 97.5 ± 17).")
    elsewhere = [replace(each, seed=(each.seed or 0) + 1) for each in other]
    assert "is not decided" in conclusions(comparison(*one, *elsewhere))[1]
    assert "by_seed" not in table(comparison(*one)).splitlines()[0]
