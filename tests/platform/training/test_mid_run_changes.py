"""A training whose settings change in mid-run is the same whether it is cut there, cut elsewhere, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from soflow_core.weights import load_weights
from soflow_platform.storage.checkpoints import EMA
from soflow_platform.training.trial_status import TrialState, read_status
from soflow_platform.training.worker import Trainer
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]
CHANGES = (
    "training.changes=[{after: 3, settings: {objective.flow_matching_share: 0.5, objective.times.start.mean: 0.5, optimizer.lr: 1e-3}},"
    " {after: 4, settings: {objective.weight_power: 0.5, objective.schedule.kind: cosine}}]"
)


def until(trainer: Trainer, step: int) -> Trainer:
    """The same trial, paused at a step."""
    return Trainer.of_job(replace(trainer.setup.job, until=step), torch.device("cpu"))


@pytest.mark.parametrize("draws", ["generator", pytest.param("counter", marks=pytest.mark.slow)])
def test_a_changed_training_has_the_same_bits_whole_and_in_pieces(worker: Make, draws: str) -> None:
    settings = (CHANGES, f"training.draws={draws}")
    whole = worker("whole", *settings)
    assert whole.run()
    for step in (2, 4):
        paused = until(worker("pieces", *settings), step)
        assert not paused.run()
        assert paused.step == step
        status = read_status(paused.setup.job.folder)
        assert status is not None
        assert status.state is TrialState.WAITING
    again = worker("pieces", *settings)
    assert again.run()
    roots = [trainer.setup.checkpoints.root for trainer in (whole, again)]
    assert differing_tensors(final_state(str(roots[0])), final_state(str(roots[1]))) == []
    assert whole.evaluations == again.evaluations


def test_until_its_change_a_training_is_that_without_one_and_then_another(worker: Make) -> None:
    plain, changed = worker("plain"), worker("changed", CHANGES)
    plain.run()
    changed.run()
    scores = [[each["eval/fd_nfe1"] for each in trainer.evaluations] for trainer in (plain, changed)]
    assert scores[0][0] == scores[1][0]
    assert scores[0][2] != scores[1][2]
    assert changed.train_step.objective == changed.experiment.at(6).objective
    assert changed.train_step.config.optimizer.lr == 1e-3
    assert (
        "trains with the settings of training.changes" in (changed.setup.job.folder / "log.txt").read_text()
    )
    newest, _ = changed.setup.checkpoints.newest([EMA])
    assert newest is not None
    with newest.opened(EMA) as path:
        assert load_weights(path).objective == changed.experiment.at(6).objective


def test_an_evaluation_at_a_rung_that_a_stop_interrupted_is_made_and_saved(worker: Make) -> None:
    trainer = until(worker("cut"), 4)
    trainer.evaluate = lambda: trainer.step != 4 and Trainer.evaluate(trainer)  # type: ignore[method-assign]
    trainer.run()
    status = read_status(trainer.setup.job.folder)
    assert status is not None
    assert status.state is TrialState.STOPPED
    again = until(worker("cut"), 4)
    again.run()
    newest, _ = again.setup.checkpoints.newest()
    assert newest is not None
    assert [each["step"] for each in newest.state.evaluations] == [2, 4]
