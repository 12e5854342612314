"""Several workers train the network that one would, lose nothing when they are killed, and agree about what goes wrong."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_pipelines.storage.opening import open_storage
from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.metric_logger import MetricLogger
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.training.job import TrialJob
from soflow_platform.training.stop_request import request_stop
from soflow_platform.training.trial_io import RankZeroIO
from soflow_platform.training.trial_status import TrialState, read_status
from soflow_platform.training.worker import Trainer
from soflow_platform.tuning.progress import ProgressActor
from tests.support.ranks import kill, start_ranks, train, wait_until
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]
NOWHERE = "http://127.0.0.1:9"
"""Where nothing listens."""


def curve(job: TrialJob, metric: str) -> dict[int, float]:
    history = TrackingStore(job.tracking_uri).client.get_metric_history(job.run, metric)
    found = {m.step: m.value for m in history}
    assert len(found) == len(history), "a step was logged twice"
    return found


@pytest.mark.parametrize("method", ["soflow", pytest.param("meanflow", marks=pytest.mark.slow)])
def test_any_number_of_workers_makes_the_same_losses(worker: Make, method: str) -> None:
    """This holds where the batch does not divide over them too."""
    settings = [f"objective={{method: {method}}}", "evaluation.every=6", "training.precision=float32"]
    alone = worker(f"{method}-1", *settings)
    alone.run()
    expected = curve(alone.setup.job, "train/loss")
    assert len(expected) == 6
    for world in (2, 3, 4):
        job = worker(f"{method}-{world}", *settings).setup.job
        assert train(job, world) == [0] * world
        assert curve(job, "train/loss") == pytest.approx(expected, rel=2e-5)
        norms, alone_norms = curve(job, "train/grad_norm"), curve(alone.setup.job, "train/grad_norm")
        assert norms[1] == pytest.approx(alone_norms[1], rel=1e-5)
        # Adam's first updates are the signs of gradients, which rounding turns where they are nearly 0.
        assert norms == pytest.approx(alone_norms, rel=2e-3)


def test_sharded_workers_train_the_network_that_one_worker_does(
    worker: Make,
) -> None:
    """Either resumes from the other's checkpoint."""
    settings = [
        "evaluation.every=3",
        "training.parallel=fsdp",
        "resources.workers=2",
        "training.precision=float32",
    ]
    alone = worker("alone", *settings)
    alone.run()
    shared = worker("shared", *settings)
    assert train(shared.setup.job, 2) == [0, 0]
    expected = curve(alone.setup.job, "train/loss")
    assert curve(shared.setup.job, "train/loss") == pytest.approx(expected, rel=2e-5)
    open_storage(shared.setup.checkpoints.root).remove("step-00000006/checkpoint.json")
    resumed = worker("shared", *settings)
    resumed.run()
    assert curve(shared.setup.job, "train/loss") == pytest.approx(expected, rel=2e-5)
    a, b = final_state(alone.setup.checkpoints.root), final_state(resumed.setup.checkpoints.root)
    assert all(torch.allclose(a[key], b[key], atol=5e-4) for key in a)


def before_each_step(trainer: Trainer, action: Callable[[int], None]) -> None:
    """Call `action` with the number of finished steps in every forward pass."""
    trainer.train_step.network.register_forward_pre_hook(lambda *_: action(trainer.step))


def slow_down(trainer: Trainer) -> None:
    before_each_step(trainer, lambda _: time.sleep(0.05))


@pytest.mark.parametrize(
    ("world", "deterministic"),
    [
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
        (3, True),
    ],
)
def test_training_killed_at_a_random_step_is_the_training_never_killed(
    worker: Make, world: int, deterministic: bool
) -> None:
    settings = ["training.steps=20", "training.checkpoint_every=3", "evaluation.every=20"]
    settings += ["training.batch=6", f"training.deterministic={str(deterministic).lower()}"]
    whole = worker("whole", *settings)
    assert train(whole.setup.job, world) == [0] * world
    cut = worker("cut", *settings)
    ranks = start_ranks(cut.setup.job, world, slow_down)
    wait_until(lambda: cut.setup.checkpoints.published())
    seed = int(os.environ.get("SOFLOW_KILL_SEED", random.randrange(1_000_000)))
    delay = random.Random(seed).uniform(0, 0.5)
    print(f"killed {delay:.3f} s after the first checkpoint (SOFLOW_KILL_SEED={seed})")
    time.sleep(delay)
    kill(ranks)
    stood = cut.setup.checkpoints.published()[-1].state.step
    assert 3 <= stood < 20
    assert train(cut.setup.job, world) == [0] * world
    assert (
        differing_tensors(final_state(whole.setup.checkpoints.root), final_state(cut.setup.checkpoints.root))
        == []
    )
    for metric in ("train/loss", "train/velocity_mse", "eval/fd_nfe1"):
        assert curve(whole.setup.job, metric) == curve(cut.setup.job, metric)


def spoil_rank_one(worker: Trainer) -> None:
    read = worker.loader._read

    def nan_at_third_step(start: int) -> Any:
        batch = read(start)
        if start == 2 * 8 and worker.setup.rank == 1:
            batch.x0[0] = float("nan")
        return batch

    worker.loader._read = nan_at_third_step  # type: ignore[method-assign]


def test_a_nan_in_one_ranks_batch_stops_all_ranks(worker: Make) -> None:
    """They stop before the update, and the failure names the rank."""
    job = worker("broken").setup.job
    assert train(job, 2, spoil_rank_one) == [1, 1]
    root = ProjectFolder(Path(job.storage)).trial(job.sweep, job.trial) / "checkpoints"
    assert [c.state.step for c in CheckpointStore(root).published()] == [2]
    assert all(
        torch.isfinite(value).all() for value in final_state(root).values() if value.is_floating_point()
    )
    assert sorted(curve(job, "train/loss")) == [1, 2]


def hold_back_rank_one_in_two_spells(worker: Trainer) -> None:
    def hold(*_: Any) -> None:
        slow = worker.setup.rank == 1 and worker.train_step.step not in range(6, 12)
        time.sleep(0.1 if slow else 0.03)

    worker.train_step.network.register_forward_pre_hook(hold)


def test_a_slow_rank_is_named_once_in_each_spell(worker: Make) -> None:
    slowed = worker("slowed", "training.steps=18", "evaluation.every=18")
    assert train(slowed.setup.job, 2, hold_back_rank_one_in_two_spells) == [0, 0]
    log = (slowed.setup.job.folder / "log.txt").read_text()
    first, second = (int(step) for step in re.findall(r"step (\d+)  rank 1 takes ", log))
    # The first steps of a process take either rank longer.
    assert first <= 6
    assert second == 15


def lose_tracking_after_two_steps(trainer: Trainer) -> None:
    def lose(step: int) -> None:
        if step == 2 and isinstance(trainer.io, RankZeroIO):
            trainer.io.metrics = MetricLogger(TrackingStore(NOWHERE), "lost", trainer.io.log, patience=0.1)
            trainer.io.log_metrics(step, {"train/loss": 0.0})
            trainer.io.metrics.send()

    slow_down(trainer)
    before_each_step(trainer, lose)
    note_failure(trainer)


def note_failure(worker: Trainer) -> None:
    run = worker.run

    def noted() -> bool:
        try:
            return run()
        except JobError as error:
            (worker.setup.job.folder / f"failure-{worker.setup.rank}").write_text(str(error))
            raise

    worker.run = noted  # type: ignore[method-assign]


def failures(folder: Path) -> list[str]:
    return [(folder / f"failure-{rank}").read_text() for rank in (0, 1)]


def lose_tracking_while_ahead(trainer: Trainer) -> None:
    trainer.train_step.runs_ahead = True
    lose_tracking_after_two_steps(trainer)


@pytest.mark.parametrize("lose_tracking", [lose_tracking_after_two_steps, lose_tracking_while_ahead])
def test_where_the_first_rank_gives_up_all_do_with_the_same_sentence(
    worker: Make, lose_tracking: Callable[[Trainer], None]
) -> None:
    lost = worker("lost", "training.steps=1000", "evaluation.every=1000")
    assert train(lost.setup.job, 2, lose_tracking) == [1, 1]
    first, second = failures(lost.setup.job.folder)
    assert first == second
    assert first.startswith(f"logging to {NOWHERE} failed for ")


def test_an_outage_of_tracking_at_the_start_fails_all_ranks(
    worker: Make,
) -> None:
    """All fail with the same sentence."""
    away = worker("away", "training.patience_minutes=0.001")
    assert train(replace(away.setup.job, tracking_uri=NOWHERE), 2, note_failure) == [1, 1]
    first, second = failures(away.setup.job.folder)
    assert first == second
    assert first.startswith("reading the run's curves failed for ")


def test_a_reported_failure_is_cleared_once_the_trial_resumes() -> None:
    actor = ProgressActor()
    actor.update("trial", {"state": TrialState.FAILED})
    actor.update("trial", {"failure": "the tracking server stayed away"})
    assert actor.snapshot()["trial"].failure == "the tracking server stayed away"
    for state in (TrialState.STARTING, TrialState.RUNNING, TrialState.FINISHED):
        actor.update("trial", {"state": state})
    assert actor.snapshot()["trial"].failure is None


def test_ranks_stop_after_the_same_step_with_everything_saved(worker: Make, storage: ProjectFolder) -> None:
    settings = ["training.steps=200", "evaluation.every=200"]
    stopped = worker("stopped", *settings)
    ranks = start_ranks(stopped.setup.job, 2, slow_down)
    wait_until(lambda: trains(stopped))
    request_stop(storage, "sweep", "stopped")
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    (saved,) = stopped.setup.checkpoints.published()
    assert 0 < saved.state.step < 200
    assert saved.state.step == saved.state.images / 8 == max(curve(stopped.setup.job, "train/loss"))


def score_slowly(worker: Trainer) -> None:
    """Of three batches, which two ranks share, the second rank has one."""
    labels = worker.setup.evaluator._labels

    def slow(indices: torch.Tensor) -> Any:
        time.sleep(0.7)
        return labels(indices)

    object.__setattr__(worker.setup.evaluator, "_labels", slow)


def test_ranks_that_are_stopped_while_scoring_stop_before_the_same_batch(
    worker: Make, storage: ProjectFolder
) -> None:
    settings = ["training.steps=40", "evaluation={every: 3, samples: 24, batch: 8, nfe: [1, 2]}"]
    stopped = worker("stopped", *settings)
    ranks = start_ranks(stopped.setup.job, 2, score_slowly)
    wait_until(lambda: step_3_is_scored(stopped))
    request_stop(storage, "sweep", "stopped")
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    (saved,) = stopped.setup.checkpoints.published()
    assert (saved.state.step, saved.state.evaluations) == (3, [])


def trains(trainer: Trainer) -> bool:
    status = read_status(trainer.setup.job.folder)
    return status is not None and status.step > 0


def step_3_is_scored(trainer: Trainer) -> bool:
    status = read_status(trainer.setup.job.folder)
    return status is not None and status.state == "evaluating" and status.step == 3
