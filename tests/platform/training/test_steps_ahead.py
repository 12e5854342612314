"""A trial whose steps are left to the device, as on a GPU: they are read where their numbers are needed, and nothing else differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training.stop_agreement import LAG
from soflow_platform.training.worker import NonFiniteError, Trainer
from tests.support.ranks import train
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]
RARE = ("training.log_every=4", "evaluation.every=6")


def ahead(trainer: Trainer) -> Trainer:
    trainer.train_step.runs_ahead = True
    return trainer


def curves(trainer: Trainer) -> dict[str, list[tuple[int, float]]]:
    client = TrackingStore(trainer.setup.job.tracking_uri).client
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(trainer.setup.job.run, name)]
        for name in ("train/loss", "train/grad_norm", "eval/fd_nfe1")
    }


def with_nan(trainer: Trainer, row: int) -> Trainer:
    """The trainer, with a NaN in the batch that begins at this row."""
    read = trainer.loader._read

    def broken(start: int) -> Any:
        batch = read(start)
        if start == row:
            batch.x0[0] = float("nan")
        return batch

    trainer.loader._read = broken  # type: ignore[method-assign]
    return trainer


def test_weights_and_curves_are_those_of_steps_that_are_waited_for(worker: Make) -> None:
    plain, other = worker("plain", *RARE), ahead(worker("ahead", *RARE))
    waits = []
    finish = other.train_step.finish
    other.train_step.finish = lambda: (records := finish(), waits.append(len(records)))[0]  # type: ignore[func-returns-value, method-assign]
    assert plain.run()
    assert other.run()
    states = [final_state(each.setup.checkpoints.root) for each in (plain, other)]
    assert differing_tensors(*states) == []
    assert curves(plain) == curves(other)
    # Steps 1, 4 and 6 are read, the others with them.
    assert [count for count in waits if count] == [1, 3, 2]


def test_a_step_that_is_not_finite_is_named_when_a_later_one_is_read(worker: Make) -> None:
    trainer = with_nan(ahead(worker("broken", *RARE, "training.checkpoint_every=2")), 2 * 8)
    with pytest.raises(NonFiniteError, match=r"velocity_\w+ is not finite at step 3 on rank 0"):
        trainer.run()
    assert trainer.step == 2
    assert [c.state.step for c in trainer.setup.checkpoints.published()] == [2]


def test_a_stop_between_two_reads_saves_the_step_it_comes_after(worker: Make) -> None:
    trainer = ahead(worker("stopped", *RARE))
    trainer.io.stop_requested = lambda step: step == 2  # type: ignore[method-assign]
    assert not trainer.run()
    assert trainer.step == 2
    assert [c.state.step for c in trainer.setup.checkpoints.published()] == [2]


def test_a_stop_after_a_step_that_is_not_finite_saves_nothing_of_it(worker: Make) -> None:
    trainer = with_nan(ahead(worker("both", *RARE, "search.stop={train/loss: nan}")), 8)
    trainer.io.stop_requested = lambda step: step == 3  # type: ignore[method-assign]
    assert not trainer.run()
    assert trainer.step == 1
    assert trainer.setup.checkpoints.published() == []
    assert "is not finite at step 2 on rank 0" in (trainer.setup.job.folder / "log.txt").read_text()


def two_ranks(trainer: Trainer, asks: str) -> Trainer:
    """A rank that runs ahead and is asked, if it is the first, by this function of its input and output after step 2."""
    if trainer.setup.rank == 0:
        setattr(trainer.io, asks, lambda step: step == 2)
    return ahead(trainer)


def stopped_after_two(trainer: Trainer) -> None:
    two_ranks(trainer, "stop_requested")


def saved_after_two(trainer: Trainer) -> None:
    two_ranks(trainer, "save_requested")


def test_ranks_stop_together_a_fixed_number_of_steps_after_the_request(worker: Make) -> None:
    trainer = worker("together", "training.steps=8", "evaluation.every=8")
    assert train(trainer.setup.job, 2, stopped_after_two) == [0, 0]
    assert [c.state.step for c in trainer.setup.checkpoints.published()] == [2 + LAG]


def test_ranks_save_together_and_train_on(worker: Make) -> None:
    plain = worker("plain", "training.steps=8", "evaluation.every=8", "training.log_every=4")
    other = worker("asked", "training.steps=8", "evaluation.every=8", "training.log_every=4")
    assert train(plain.setup.job, 2) == [0, 0]
    assert train(other.setup.job, 2, saved_after_two) == [0, 0]
    assert [c.state.step for c in other.setup.checkpoints.published()] == [2 + LAG, 8]
    states = [final_state(each.setup.checkpoints.root) for each in (plain, other)]
    assert differing_tensors(*states) == []
