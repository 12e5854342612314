"""More steps: trials whose settings do not depend on the total go on from a shorter training, bit for bit; others are trained anew."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from soflow_core.weights import read_torch_file
from soflow_platform.config.document import apply_override, read_document
from soflow_platform.config.validation import validate
from soflow_platform.storage.checkpoints import STATE
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.dataset import check_data
from soflow_platform.training.length_dependence import length_dependence
from soflow_platform.training.model import describe_network
from soflow_platform.tuning.continuation import continue_trials
from soflow_platform.tuning.record import SweepRecord, load_record, new_or_resumed_record
from soflow_platform.tuning.search_space import Trial, trials
from tests.support.scored_sweep import ROOT, SETTINGS, SWEEP
from tests.support.trained_trials import trainer_of

LONGER = "training={steps: 9, batch: 8, ema: [0.5], log_every: 1, keep_checkpoints: 10}"


def longer(project: ProjectFolder) -> tuple[SweepRecord, list[Trial]]:
    """The sweep of the same file with more steps, as it is before its first start."""
    old = load_record(project, SWEEP)
    assert old is not None
    replace(old, attempts=1).save(project)
    document = read_document(ROOT / "sweeps" / "digits.yaml")
    for setting in (*SETTINGS, LONGER):
        apply_override(document, setting)
    experiment = validate(document)
    planned = trials(document, experiment)
    return new_or_resumed_record(None, "digits-longer", "digits.yaml", experiment, planned), planned


def trained(project: ProjectFolder, sweep: str, trial: Trial) -> dict[str, torch.Tensor]:
    """The weights after the trial's training in this process, from its newest checkpoint."""
    tracking = Tracking.open(project.tracking_uri, "digits", project)
    trainer = trainer_of(project, tracking, trial.experiment, sweep, trial.name)
    trainer.run()
    return trainer.train_step.module.state_dict()


def test_a_longer_training_is_the_shorter_one_and_what_follows(scored: ProjectFolder) -> None:
    record, planned = longer(scored)
    lines: list[str] = []
    continue_trials(scored, record, planned, check_data(planned[0].experiment), lines.append)
    assert lines == [
        f"1 trial(s) go on from step 6 of sweep {SWEEP}, which is kept",
        "1 trial(s) are trained anew, although a shorter training is there: the schedule of soflow depends on training.steps",
    ]
    soflow, flow_matching = planned
    assert record.checkpoints(scored, soflow.name).published() == []
    (copied,) = record.checkpoints(scored, flow_matching.name).published()
    assert [each["step"] for each in copied.state.evaluations] == [2, 4, 6]
    assert {point[3] for point in copied.state.pending_metrics} == {2, 4, 6}
    older = load_record(scored, SWEEP)
    assert older is not None
    assert max(c.state.step for c in older.checkpoints(scored, flow_matching.name).published()) == 6
    with older.checkpoints(scored, flow_matching.name).published()[-1].opened(STATE) as path:
        assert read_torch_file(path)["total_steps"] == 6

    through = trained(scored, "never-cut", flow_matching)
    went_on = trained(scored, record.id, flow_matching)
    assert all(torch.equal(tensor, went_on[name]) for name, tensor in through.items())
    # With a checkpoint of its own it goes on from that.
    lines.clear()
    continue_trials(scored, record, [flow_matching], check_data(flow_matching.experiment), lines.append)
    assert lines == []


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("objective={method: flow_matching}", None),
        ("objective={method: diffusion}", None),
        ("objective={method: meanflow}", None),
        ("objective={method: soflow, schedule: {kind: constant, initial: 0.1, final: 0.1}}", None),
        ("objective={method: soflow}", "the schedule of soflow depends on training.steps"),
        ("objective={method: ict}", "the schedule of ict depends on training.steps"),
        ("objective={method: ect}", "the schedule of ect depends on training.steps"),
        ("objective={method: alphaflow}", "the schedule of alphaflow depends on training.steps"),
        ("optimizer.decay=cosine", "the learning rate (optimizer.decay: cosine) depends on training.steps"),
    ],
)
def test_what_depends_on_the_length_is_found(override: str, reason: str | None) -> None:
    document = read_document(ROOT / "sweeps" / "digits.yaml")
    for setting in ("search=!drop", "training.steps=400", override):
        apply_override(document, setting)
    experiment = validate(document)
    network = describe_network(experiment, check_data(experiment)).small()
    assert length_dependence(experiment, network, 800) == reason
