"""A trial that runs out of memory goes on in smaller pieces of the same batch, and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from soflow_platform.evaluation.evaluator import Evaluator
from soflow_platform.training.launch import train_here
from soflow_platform.training.memory_pieces import with_more_pieces, with_pieces
from soflow_platform.training.worker import Trainer


def test_memory_that_is_exhausted_halves_the_pieces_and_not_the_batch(
    worker: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = worker("full")
    job = made.setup.job
    taken = []
    step = Trainer.train_one_step

    def needs_two_pieces(trainer: Trainer) -> Any:
        taken.append((trainer.step, trainer.experiment.training.accumulate))
        if trainer.step == 3 and trainer.experiment.training.accumulate < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_one_step", needs_two_pieces)
    evaluations = list(train_here(job, made.experiment, None))
    # From the checkpoint of step 2, with half of the samples at a time.
    assert taken == [(0, 1), (1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (2, 4), (3, 4), (4, 4), (5, 4)]
    assert [evaluation["step"] for evaluation in evaluations] == [2, 4, 6]
    log = (job.folder / "log.txt").read_text()
    assert "each worker's 8 samples of a step in 2 pieces (training.accumulate)" in log
    assert "in 4 pieces" in log
    assert with_pieces(job).experiment["training"]["accumulate"] == 4
    other = {**job.experiment, "training": {**job.experiment["training"], "batch": 16}}
    assert with_pieces(replace(job, experiment=other)).experiment["training"]["accumulate"] == 1


def test_other_errors_and_batches_that_cannot_be_divided_are_left_alone(
    worker: Callable[..., Trainer],
) -> None:
    job = worker("odd", "training.batch=6", "training.accumulate=2").setup.job
    assert with_more_pieces(job, RuntimeError("out of luck")) is None
    assert with_more_pieces(job, torch.OutOfMemoryError("CUDA out of memory")) is None
    assert not (job.folder / "pieces.json").exists()


def test_scores_that_have_no_room_leave_the_pieces_of_a_step_as_they_are(
    worker: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller pieces would free nothing for them, and slow the trial down for good."""
    made = worker("scored")

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Evaluator, "evaluate", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(train_here(made.setup.job, made.experiment, None))
    assert not (made.setup.job.folder / "pieces.json").exists()
