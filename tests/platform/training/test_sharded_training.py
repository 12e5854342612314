"""A network of which every rank holds a share is scored and saved like one that is whole, and nobody holds more than is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from soflow_core.networks import DiT
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training import ema_network
from soflow_platform.training.job import TrialJob
from soflow_platform.training.worker import Trainer
from tests.support.ranks import train
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]
SHARDED = ("training.parallel=fsdp", "resources.workers=2", "training.precision=float32")
UNEVEN = "evaluation={every: 3, samples: 40, batch: 16, nfe: [1, 2], features: pooled, grid: 2}"
"""Three batches for two ranks."""


def curve(job: TrialJob, metric: str) -> dict[int, float]:
    history = TrackingStore(job.tracking_uri).client.get_metric_history(job.run, metric)
    return {m.step: m.value for m in history}


def refuse_a_whole_network(worker: Trainer) -> None:
    def whole(*_: object) -> DiT:
        raise AssertionError(f"rank {worker.setup.rank} builds a whole network beside its share")

    ema_network.DiT = whole  # type: ignore[attr-defined, assignment]


def test_a_sharded_network_is_scored_as_the_whole_one_is(
    worker: Make,
) -> None:
    """Ranks may have unequal numbers of forward passes."""
    alone, shared = worker("alone", *SHARDED, UNEVEN), worker("shared", *SHARDED, UNEVEN)
    alone.run()
    assert train(shared.setup.job, 2, refuse_a_whole_network) == [0, 0]
    for metric in ("eval/fd_nfe1", "eval/fd_nfe2"):
        expected = curve(alone.setup.job, metric)
        assert list(expected) == [3, 6]
        assert curve(shared.setup.job, metric) == pytest.approx(expected, rel=1e-3)
    for step in (0, 3, 6):
        assert (shared.setup.job.folder / "samples" / f"nfe1-step-{step:08d}.png").exists()


def test_scoring_shares_changes_nothing_of_their_training(worker: Make) -> None:
    often, once = (
        worker("often", *SHARDED, "evaluation.every=1"),
        worker("once", *SHARDED, "evaluation.every=6"),
    )
    assert train(often.setup.job, 2) == [0, 0]
    assert train(once.setup.job, 2) == [0, 0]
    assert (
        differing_tensors(final_state(often.setup.checkpoints.root), final_state(once.setup.checkpoints.root))
        == []
    )


def note_copies(worker: Trainer) -> None:
    run = worker.run

    def noted() -> bool:
        finished = run()
        copied = len(worker._state_copy._buffers)
        (worker.setup.job.folder / f"copied-{worker.setup.rank}").write_text(str(copied))
        return finished

    worker.run = noted  # type: ignore[method-assign]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_only_the_rank_that_saves_holds_a_copy_of_the_state(worker: Make, parallel: str) -> None:
    trial = worker("copied", f"training.parallel={parallel}", "resources.workers=2")
    assert train(trial.setup.job, 2, note_copies) == [0, 0]
    copied = [int(Path(trial.setup.job.folder, f"copied-{rank}").read_text()) for rank in (0, 1)]
    assert copied[0] > 50
    assert copied[1] == 0
