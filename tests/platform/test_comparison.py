"""Methods side by side: the same numbers as scored alone, each cost measured, and sentences that the rows bear out."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scored_sweep import SWEEP, measure_here

from soflow_core.networks import DiTConfig
from soflow_core.objectives import ContinuousConsistency, Diffusion, FlowMatching, MeanFlow, SoFlow
from soflow_core.training import OptimizerConfig
from soflow_platform.cli.compare import find_protocol
from soflow_platform.comparison import Comparison, Row, compare
from soflow_platform.comparison_report import markdown, save, table
from soflow_platform.config.comparison import SamplingConfig
from soflow_platform.config.experiment import Experiment
from soflow_platform.costs import Sampled, Trained, measure_costs
from soflow_platform.errors import UserError
from soflow_platform.jobs.evaluate import EvaluateRequest, evaluate
from soflow_platform.jobs.gather import Gathering, Progress
from soflow_platform.measurement import Measurement
from soflow_platform.storage import Storage
from soflow_platform.sweep_record import SweepRecord, load_record
from soflow_platform.tracking import client_for

TINY = DiTConfig(
    channels=1, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=10, null_label=True
)


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are made in this process before they are asked of a cluster, which then has nothing to do."""
    ask = Gathering.statistics

    def statistics(self: Gathering, measurements: list[Measurement]) -> Any:
        for measurement in measurements:
            measure_here(self._storage, measurement)
        return ask(self, measurements)

    monkeypatch.setattr(Gathering, "statistics", statistics)


@pytest.fixture
def record(scored: Storage) -> SweepRecord:
    found = load_record(scored, SWEEP)
    assert found is not None
    return found


def compared(storage: Storage, record: SweepRecord, **settings: Any) -> Comparison:
    protocol = settings.pop("protocol", Experiment(**record.experiment).comparison)
    seen: list[Progress] = []
    found = compare(
        record,
        protocol,
        storage,
        storage.tracking_uri,
        None,
        seen.append,
        settings.pop("costs", False),
        print,
    )
    assert not settings
    return found


def test_every_method_is_sampled_in_every_way_that_covers_it(scored: Storage, record: SweepRecord) -> None:
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


def test_a_row_is_the_score_of_the_newest_checkpoint_by_itself(scored: Storage, record: SweepRecord) -> None:
    newest = scored.trial(SWEEP, "trial-01-flow_matching") / "checkpoints" / "step-00000006"
    row = compared(scored, record).rows[-1]
    request = EvaluateRequest(
        str(newest), num=80, steps=(2,), labels="balanced", sampling={"sampling_scale": 2.0}
    )
    _, (score,) = evaluate(request, scored, scored.tracking_uri)
    assert (row.distance, row.label_agreement) == (score.values["fd"], score.values["label_agreement"])


def test_the_numbers_stand_on_the_runs_of_their_trials(scored: Storage, record: SweepRecord) -> None:
    rows = compared(scored, record).rows
    runs = {
        run.data.tags["soflow.trial"]: run.data.metrics
        for run in client_for(scored.tracking_uri).search_runs([record.experiment_id or ""])
        if "soflow.trial" in run.data.tags
    }
    assert runs["trial-00-soflow"]["evaluate/fd100_nfe2_balanced"] == rows[1].distance
    assert runs["trial-01-flow_matching"]["evaluate/fd80_nfe4_balanced"] == rows[4].distance


def test_a_trial_that_has_not_had_its_budget_is_flagged_and_one_without_weights_left_out(
    scored: Storage, record: SweepRecord
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


def test_a_sweep_file_says_how_its_sweep_is_sampled_now(scored: Storage, record: SweepRecord) -> None:
    found, protocol = find_protocol(SWEEP, (), scored)
    assert (found.id, protocol) == (SWEEP, Experiment(**record.experiment).comparison)
    with pytest.raises(UserError, match="is one trial: name its sweep"):
        find_protocol("trial-00-soflow", (), scored)
    with pytest.raises(UserError, match="as it stands has not run under"):
        find_protocol("digits", ("seed=5",), scored)


def test_how_networks_are_compared_is_no_part_of_their_training(record: SweepRecord) -> None:
    experiment = Experiment(**record.experiment)
    other = experiment.model_copy(update={"comparison": (SamplingConfig(steps=(32,)),)})
    assert other.digest() == experiment.digest()


def row(method: str, nfe: int, distance: float, budget: str = "steps", jvp: bool = False) -> Row:
    return Row(budget, f"trial-{method}", method, jvp, 600, "", nfe, nfe, 2000, distance, None)


def comparison(*rows: Row) -> Comparison:
    return Comparison("methods-0", "fd", list(rows), {"features": "digits-cnn-1"}, None)


def test_the_claim_of_one_step_without_a_jacobian_vector_product_is_said_to_hold_where_it_does() -> None:
    holds = comparison(
        row("meanflow", 1, 9.0, jvp=True), row("soflow", 1, 8.0), row("flow_matching", 1, 90.0)
    )
    assert holds.conclusions() == [
        "equal steps, 1 NFE: the best is soflow, without a Jacobian-vector product, fd 8.",
        "equal steps: that SoFlow has the best distance at one evaluation holds (fd 8).",
    ]


def test_the_claim_is_said_not_to_hold_where_it_does_not() -> None:
    fails = comparison(
        row("meanflow", 1, 7.0, jvp=True),
        row("soflow", 1, 8.0),
        row("shortcut", 1, 7.5),
        row("flow_matching", 32, 3.0),
    )
    assert fails.conclusions() == [
        "equal steps, 1 NFE: the best is meanflow, with a Jacobian-vector product, fd 7.",
        "equal steps, 1 NFE: the best without a Jacobian-vector product is shortcut, fd 7.5.",
        "equal steps: that SoFlow has the best distance at one evaluation does not hold: it is 3 of 3 (fd 8).",
        "equal steps, any NFE: the best is flow_matching at 32 NFE, fd 3.",
    ]


def test_each_budget_is_judged_by_its_own_rows() -> None:
    both = comparison(
        row("soflow", 1, 8.0),
        row("meanflow", 1, 9.0, jvp=True),
        row("soflow", 1, 8.0, "evaluations"),
        row("meanflow", 1, 5.0, "evaluations", jvp=True),
    )
    said = both.conclusions()
    assert said[1].endswith("holds (fd 8).")
    assert said[4].endswith("does not hold: it is 2 of 2 (fd 8).")


def test_the_report_holds_every_row_as_table_file_and_picture(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_costs_are_those_of_the_method_whatever_the_weights() -> None:
    def trained(objective: Any, batch: int = 64) -> Trained:
        return Trained(TINY, objective, OptimizerConfig(), batch, 100, (0.9,), "float32")

    found = measure_costs(
        [
            trained(FlowMatching()),
            trained(SoFlow()),
            trained(ContinuousConsistency()),
            trained(MeanFlow()),
            trained(FlowMatching(), batch=256),
        ],
        [
            Sampled(TINY, SoFlow(), 1),
            Sampled(TINY, FlowMatching(), 40),
            Sampled(TINY, Diffusion(sampler="ddpm"), 200),
        ],
    )
    assert found.threads == 1
    one, forty, many = found.image_seconds
    assert 0 < one < forty < many
    assert all(seconds > 0 for seconds in found.step_seconds)
    matching, _, consistency, _, large = found.peak_bytes
    # Four times the batch has more activations; the tangents of a Jacobian-vector product are tensors too.
    assert matching < consistency < large
    again = measure_costs([trained(FlowMatching())], [])
    assert again.peak_bytes == [matching]
