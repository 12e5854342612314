"""Training that was interrupted is the training that never was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_core.ema import Exponential
from soflow_core.objectives import OBJECTIVES
from soflow_core.weights import load_weights
from soflow_pipelines.storage.files import sha256
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage import checkpoints
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.training.resume import load_state
from soflow_platform.training.stop_request import request_save
from soflow_platform.training.trial_status import TrialState, TrialStatusWriter
from soflow_platform.training.worker import NonFiniteError, Trainer
from tests.support.trained_state import differing_tensors, final_state

Make = Callable[..., Trainer]
EMA_NAME = Exponential(0.5).name


class Killed(BaseException):
    """Stands for the end of a process: nothing after it runs, and nothing may catch it."""


def run_until(trainer: Trainer, step: int) -> None:
    """Train, and end as a killed process does once `step` steps are done."""

    def die(*_: object) -> None:
        if trainer.step == step:
            raise Killed

    trainer.train_step.network.register_forward_pre_hook(die)
    with pytest.raises(Killed):
        trainer.run()


def curve(worker: Trainer, metric: str) -> list[tuple[int, float]]:
    history = TrackingStore(worker.setup.job.tracking_uri).client.get_metric_history(
        worker.setup.job.run, metric
    )
    return [(m.step, m.value) for m in history]


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_weights_and_curves_after_a_kill_are_those_of_the_run_never_killed(
    worker: Make, killed_at: int
) -> None:
    whole = worker("whole")
    whole.run()
    run_until(worker("cut"), killed_at)
    again = worker("cut")
    again.run()
    assert (
        differing_tensors(
            final_state(whole.setup.checkpoints.root), final_state(again.setup.checkpoints.root)
        )
        == []
    )
    for metric in ("train/loss", "train/velocity_mse", "eval/fd_nfe1", "eval/fd_nfe2"):
        assert curve(whole, metric) == curve(again, metric)
        assert len(curve(again, metric)) == len({step for step, _ in curve(again, metric)})


@pytest.mark.parametrize("file", [checkpoints.STATE, checkpoints.EMA, checkpoints.RECORD])
def test_damaged_checkpoints_do_not_change_the_training(worker: Make, file: str) -> None:
    """Resuming past them gives the numbers of an undamaged training, and none of them is kept."""
    settings = ["training.keep_checkpoints=1", "evaluation.every=6", "training.checkpoint_every=1"]
    whole, cut = worker("whole", *settings), worker("cut", *settings)
    whole.run()
    cut.io.checkpointer.keep = 10
    run_until(cut, 4)
    for step in (3, 4):
        content = Path(cut.setup.checkpoints.root, f"step-{step:08d}", file).read_bytes()
        Path(cut.setup.checkpoints.root, f"step-{step:08d}", file).write_bytes(content[: len(content) // 2])
    again = worker("cut", *settings)
    again.resume()
    assert again.train_step.step == 2
    assert [c.state.step for c in again.setup.checkpoints.published()] == [1, 2]
    again.run()
    assert [path.name for path in Path(again.setup.checkpoints.root).iterdir()] == ["step-00000006"]
    assert (
        differing_tensors(
            final_state(whole.setup.checkpoints.root), final_state(again.setup.checkpoints.root)
        )
        == []
    )
    log = (again.setup.job.folder / "log.txt").read_text()
    assert f"step-00000004 is damaged ({file}): going back to the one before it." in log


def test_checkpoints_that_are_gone_are_missed_aloud(worker: Make) -> None:
    first = worker("moved")
    run_until(first, 5)
    assert "WARNING" not in (first.setup.job.folder / "log.txt").read_text()
    # The process of a trial publishes its state before the workers look for checkpoints.
    TrialStatusWriter(first.setup.job.folder, "moved", 6, attempt=2).set_state(TrialState.STARTING)
    Path(first.setup.checkpoints.root).rename(
        tmp := Path(first.setup.checkpoints.root).with_name("elsewhere")
    )
    again = worker("moved")
    again.resume()
    log = (again.setup.job.folder / "log.txt").read_text()
    assert (
        f"WARNING: this trial has trained to step 4 and no checkpoint of it is found in {first.setup.checkpoints.root}"
        in log
    )
    tmp.rename(first.setup.checkpoints.root)
    third = worker("moved")
    third.resume()
    assert third.train_step.step == 4
    assert (again.setup.job.folder / "log.txt").read_text().count("WARNING") == 1


def test_a_trial_does_not_go_on_with_other_data(worker: Make) -> None:
    run_until(worker("fed"), 3)
    again = worker("fed")
    seen = again.loader.info.digest
    again.loader.info = replace(again.loader.info, digest="of other data")
    with pytest.raises(
        JobError, match=rf"step 2 was trained on data of digest {seen} and .* digest of other data"
    ):
        again.resume()
    assert [c.state.data for c in again.setup.checkpoints.published()] == [seen]


def make_non_finite(folder: Path, place: tuple[Any, ...]) -> None:
    """Puts a NaN into a tensor of a checkpoint's state, and makes its checksum that of the file."""
    path = folder / checkpoints.STATE
    state = torch.load(path, weights_only=True)
    part = state
    for key in place:
        part = part[key]
    part.view(-1)[0] = float("nan")
    torch.save(state, path)
    record = json.loads((folder / checkpoints.RECORD).read_text())
    record["files"][checkpoints.STATE] = sha256(path)
    (folder / checkpoints.RECORD).write_text(json.dumps(record))


def test_no_training_goes_on_from_values_that_are_not_finite(worker: Make) -> None:
    run_until(worker("sick"), 3)
    for place, named in (
        (("network", "final_layer.linear.bias"), r"network\.final_layer\.linear\.bias"),
        (("optimizer", "state", 0, "exp_avg_sq"), r"optimizer\.state\.0\.exp_avg_sq"),
        (("ema", EMA_NAME, "final_layer.linear.bias"), r"ema\..*final_layer\.linear\.bias"),
    ):
        again = worker("sick")
        (checkpoint,) = again.setup.checkpoints.published()
        folder = Path(checkpoint.location)
        sound = {path: path.read_bytes() for path in folder.iterdir()}
        make_non_finite(folder, place)
        with pytest.raises(
            JobError, match=rf"step-00000002/state\.pt has values that are not finite \({named}"
        ):
            again.resume()
        assert all(torch.isfinite(parameter).all() for parameter in again.train_step.parameters)
        for path, content in sound.items():
            path.write_bytes(content)
    again = worker("sick")
    again.resume()
    assert again.train_step.step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [1], "is not the state of a training: it lacks step, total_steps"),
        (
            lambda state: {**state, "total_steps": 9},
            "is not the state of this training: the state is of 9 total",
        ),
    ],
)
def test_a_state_of_something_else_is_refused_by_its_place(
    worker: Make, change: Callable[[Any], Any], message: str
) -> None:
    run_until(worker("other"), 3)
    again = worker("other")
    (checkpoint,) = again.setup.checkpoints.published()
    path = Path(checkpoint.location, checkpoints.STATE)
    torch.save(change(torch.load(path, weights_only=True)), path)
    checkpoint.files[checkpoints.STATE] = sha256(path)
    with pytest.raises(JobError, match=rf"step-00000002/state\.pt {message}"):
        load_state(checkpoint, again.train_step)


def test_evaluating_changes_no_random_number_of_the_training(worker: Make) -> None:
    often, once = worker("often", "evaluation.every=1"), worker("once", "evaluation.every=6")
    often.run()
    once.run()
    assert (
        differing_tensors(final_state(often.setup.checkpoints.root), final_state(once.setup.checkpoints.root))
        == []
    )


def test_sampling_changes_scores_and_no_weight_and_goes_with_the_weights(worker: Make) -> None:
    ways = ("evaluation.nfe=[2]", "search.metric=eval/fd_nfe2", "training.steps=2")
    plain = worker("plain", *ways)
    stepped = worker("stepped", *ways, "sampling={sampler: ode, grid: 'power:3'}")
    for each in (plain, stepped):
        each.run()
    states = [final_state(each.setup.checkpoints.root) for each in (plain, stepped)]
    assert differing_tensors(*states) == []
    assert plain.evaluations[0]["eval/fd_nfe2"] != stepped.evaluations[0]["eval/fd_nfe2"]
    with stepped.setup.checkpoints.published()[-1].opened(checkpoints.EMA) as path:
        found = load_weights(path).objective
    assert found == replace(plain.experiment.objective, sampler="ode", sampling_grid="power:3")


def test_a_loss_that_is_not_finite_stops_before_the_update(worker: Make) -> None:
    """The failure names term and step."""
    broken = worker("broken")
    read = broken.loader._read

    def nan_at_third_step(start: int) -> Any:
        batch = read(start)
        if start == 2 * 8:
            batch.x0[0] = float("nan")
        return batch

    broken.loader._read = nan_at_third_step  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match=r"velocity_\w+ is not finite at step 3 on rank 0"):
        broken.run()
    assert [c.state.step for c in broken.setup.checkpoints.published()] == [2]
    assert all(torch.isfinite(p).all() for p in broken.train_step.parameters)


def test_the_registered_weights_are_the_first_ema_and_say_what_they_are(worker: Make) -> None:
    whole = worker("whole")
    whole.run()
    with whole.setup.checkpoints.published()[-1].opened(checkpoints.EMA) as path:
        weights = load_weights(path)
    average = whole.train_step.ema.average()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in average.items())
    assert weights.objective == whole.experiment.objective
    assert weights.network_config == whole.setup.config
    assert weights.data["class_names"][3] == "3"


def test_grids_are_kept_once_for_each_step(worker: Make, tracking: Tracking) -> None:
    whole = worker("whole")
    whole.run()
    image = np.zeros((4, 4, 3), np.uint8)
    whole.io.metrics.log_image(2, "samples/nfe1", image)
    whole.io.metrics.flush()
    names = [Path(item.path).name for item in tracking.client.list_artifacts(whole.setup.job.run, "images")]
    assert len([n for n in names if n.startswith("samples~nfe1+step+2+") and n.endswith(".png")]) == 1
    assert len([n for n in names if n.endswith(".png")]) == 4 * 2


def test_data_that_does_not_fit_the_network_is_refused(worker: Make, storage: ProjectFolder) -> None:
    """The error names both sides."""
    with pytest.raises(
        UserError, match=r"data\.shape is \(4, 32, 32\) and data\.source digits has \(1, 8, 8\)"
    ):
        worker("misfit", "data={source: digits, shape: [4, 32, 32], classes: 10}")
    with pytest.raises(UserError, match=r"data\.classes is 1000 and data\.source digits has 10"):
        worker("misfit", "data={source: digits, shape: [1, 8, 8], classes: 1000}")
    assert not storage.sweeps.exists()


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_every_method_trains_and_is_scored_by_the_same_loop(worker: Make, method: str) -> None:
    trained = worker(method, f"objective={{method: {method}}}", "training.steps=2")
    trained.run()
    (evaluation,) = trained.evaluations
    assert evaluation["step"] == 2
    assert np.isfinite(evaluation["eval/fd_nfe1"])
    with trained.setup.checkpoints.published()[-1].opened(checkpoints.EMA) as path:
        weights = load_weights(path)
    assert weights.objective is not None
    assert weights.objective.method == method


def test_a_stop_interrupts_scoring_which_is_made_up_for_on_resuming(
    worker: Make,
) -> None:
    whole, cut = worker("whole", "evaluation.batch=8"), worker("cut", "evaluation.batch=8")
    whole.run()
    asked = 0

    def at_the_third_batch_of_step_4(step: int) -> bool:
        nonlocal asked
        asked += step == 4
        return asked == 3

    cut.io.stop_requested = at_the_third_batch_of_step_4  # type: ignore[method-assign]
    assert not cut.run()
    saved = cut.setup.checkpoints.published()[-1].state
    assert (saved.step, [e["step"] for e in saved.evaluations]) == (4, [2])
    assert len(curve(cut, "eval/fd_nfe1")) == 1
    again = worker("cut", "evaluation.batch=8")
    assert again.run()
    assert (
        differing_tensors(
            final_state(whole.setup.checkpoints.root), final_state(again.setup.checkpoints.root)
        )
        == []
    )
    for metric in ("train/loss", "eval/fd_nfe1", "eval/fd_nfe2"):
        assert curve(whole, metric) == curve(again, metric)
    assert whole.evaluations == again.evaluations


def test_a_request_to_save_is_met_at_the_next_step_and_training_goes_on(
    worker: Make, storage: ProjectFolder
) -> None:
    asked = worker("asked", "training.keep_checkpoints=20")
    request_save(storage, asked.setup.job.sweep, "1 node(s) are drained")
    assert asked.run()
    steps = [checkpoint.state.step for checkpoint in asked.setup.checkpoints.published()]
    assert steps[:2] == [1, 2]
    assert (asked.setup.job.folder / "log.txt").read_text().count("asked to save") == 1
    # One that was made before a trial began is none of its own.
    later = worker("later", "training.keep_checkpoints=20")
    assert later.run()
    assert 1 not in [checkpoint.state.step for checkpoint in later.setup.checkpoints.published()]


def test_a_stop_during_the_last_score_waits_for_it(worker: Make) -> None:
    last = worker("last", "evaluation.every=6", "evaluation.batch=8")
    last.io.stop_requested = lambda step: step == 6  # type: ignore[method-assign]
    assert last.run()
    assert [e["step"] for e in last.evaluations] == [6]
