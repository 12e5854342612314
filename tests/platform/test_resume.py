"""Training that was interrupted is the training that never was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_core.checkpoints import load_weights
from soflow_core.objectives import OBJECTIVES
from soflow_platform import checkpoints
from soflow_platform.errors import UserError
from soflow_platform.storage import Storage
from soflow_platform.tracking import Tracking, client_for
from soflow_platform.training import NonFiniteError, TrialWorker

Make = Callable[..., TrialWorker]


class Killed(BaseException):
    """Stands for the end of a process: nothing after it runs, and nothing may catch it."""


def run_until(worker: TrialWorker, step: int) -> None:
    """Train, and end without a word once `step` steps are done."""
    take = worker.train_step

    class Dying:
        def __getattr__(self, name: str) -> Any:
            return getattr(take, name)

        def __call__(self, *args: Any) -> Any:
            if take.step == step:
                raise Killed
            return take(*args)

    worker.train_step = Dying()  # type: ignore[assignment]
    with pytest.raises(Killed):
        worker.run()


def final_state(worker: TrialWorker) -> dict[str, Any]:
    found, damaged = checkpoints.newest(worker.root)
    assert found is not None
    assert damaged == []
    state: dict[str, Any] = torch.load(found.state, weights_only=True)
    return state


def flat(state: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(state, dict):
        return {k: v for key, below in state.items() for k, v in flat(below, f"{prefix}{key}.").items()}
    return {prefix: state}


def curve(worker: TrialWorker, metric: str) -> list[tuple[int, float]]:
    history = client_for(worker.job.tracking_uri).get_metric_history(worker.job.run, metric)
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
    expected, found = flat(final_state(whole)), flat(final_state(again))
    assert expected.keys() == found.keys()
    tensors = [key for key, value in expected.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 50
    assert [key for key in tensors if not torch.equal(expected[key], found[key])] == []
    for metric in ("train/loss", "train/velocity_mse", "eval/fd_nfe1", "eval/fd_nfe2"):
        assert curve(whole, metric) == curve(again, metric)
        assert len(curve(again, metric)) == len({step for step, _ in curve(again, metric)})


def test_evaluating_changes_no_random_number_of_the_training(worker: Make) -> None:
    often, once = worker("often", "evaluation.every=1"), worker("once", "evaluation.every=6")
    often.run()
    once.run()
    a, b = flat(final_state(often)["network"]), flat(final_state(once)["network"])
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(worker: Make) -> None:
    whole = worker("whole")
    whole.run()
    newest = checkpoints.published(whole.root)[-1]
    content = bytearray(newest.state.read_bytes())
    content[len(content) // 2] ^= 1
    newest.state.write_bytes(content)
    found, damaged = checkpoints.newest(whole.root)
    assert found is not None
    assert found.position.step == 4
    assert damaged == ["step-00000006 is damaged (state.pt): going back to the one before it."]


def test_a_checkpoint_being_written_when_the_process_dies_does_not_exist(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / checkpoints.STATE).write_bytes(b"half")
        raise Killed

    with pytest.raises(Killed):
        checkpoints.publish(tmp_path, checkpoints.Position(5, 40, "run"), dies)
    assert checkpoints.published(tmp_path) == []
    assert checkpoints.newest(tmp_path) == (None, [])


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in range(1, 7):
        position = checkpoints.Position(step, 8 * step, "run")
        checkpoints.publish(tmp_path, position, lambda folder: (folder / "state.pt").touch())
        checkpoints.prune(tmp_path, keep=2, best_step=2)
    assert [c.position.step for c in checkpoints.published(tmp_path)] == [2, 5, 6]


def test_nan_is_never_the_best_evaluation() -> None:
    evaluations = [{"step": 1, "fd": float("nan")}, {"step": 2, "fd": 3.0}, {"step": 3, "fd": 4.0}]
    assert checkpoints.best_evaluation(evaluations, "fd", "min") == evaluations[1]
    assert checkpoints.best_evaluation(evaluations, "fd", "max") == evaluations[2]
    assert checkpoints.best_evaluation(evaluations[:1], "fd", "min") is None


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_term_and_step(worker: Make) -> None:
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
    assert [c.position.step for c in checkpoints.published(broken.root)] == [2]
    assert all(torch.isfinite(p).all() for p in broken.train_step.parameters)


def test_the_registered_weights_are_the_first_ema_and_say_what_they_are(worker: Make) -> None:
    whole = worker("whole")
    whole.run()
    weights = load_weights(checkpoints.published(whole.root)[-1].ema)
    average = whole.train_step.ema.average()
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in average.items())
    assert weights.objective == whole.experiment.objective
    assert weights.network_config == whole.config
    assert weights.data["class_names"][3] == "3"


def test_grids_are_kept_once_for_each_step(worker: Make, tracking: Tracking) -> None:
    whole = worker("whole")
    whole.run()
    assert whole.log is not None
    image = np.zeros((4, 4, 3), np.uint8)
    whole.log.grid(2, "samples/nfe1", image)
    names = [Path(item.path).name for item in tracking.client.list_artifacts(whole.job.run, "images")]
    assert len([n for n in names if n.startswith("samples~nfe1+step+2+") and n.endswith(".png")]) == 1
    assert len([n for n in names if n.endswith(".png")]) == 4 * 2


def test_data_that_does_not_fit_the_network_is_refused_with_both_sides_named(
    worker: Make, storage: Storage
) -> None:
    with pytest.raises(UserError, match=r"holds pixels of shape 1 x 8 x 8, the network takes 4 x 32 x 32"):
        worker("misfit", "data={source: digits, shape: [4, 32, 32], classes: 10}")
    with pytest.raises(UserError, match=r"holds 10 classes, the network is conditioned on 1000 classes"):
        worker("misfit", "data={source: digits, shape: [1, 8, 8], classes: 1000}")
    assert not storage.sweeps.exists()


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_every_method_trains_and_is_scored_by_the_same_loop(worker: Make, method: str) -> None:
    trained = worker(method, f"objective={{method: {method}}}", "training.steps=2")
    trained.run()
    (evaluation,) = trained.evaluations
    assert evaluation["step"] == 2
    assert np.isfinite(evaluation["eval/fd_nfe1"])
    weights = load_weights(checkpoints.published(trained.root)[-1].ema)
    assert weights.objective is not None
    assert weights.objective.method == method
