"""A trial trained in this process without Ray: the bits of a trial of a sweep, and nothing kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.in_process import train_locally
from soflow_platform.training.worker import Trainer
from tests.platform.conftest import small_experiment


def test_weights_and_scores_are_those_of_a_trial_of_a_sweep(
    storage: ProjectFolder, worker: Callable[..., Trainer]
) -> None:
    in_a_sweep = worker("trial")
    assert in_a_sweep.run()
    kept = {path for path in storage.root.rglob("*") if "sweeps" in path.parts}
    printed: list[str] = []
    local = train_locally(small_experiment(), "trial", storage, printed.append)
    assert local.evaluations == in_a_sweep.evaluations
    expected = in_a_sweep.train_step.state_dict()
    for name, tensor in local.train_step.state_dict()["network"].items():
        assert torch.equal(tensor, expected["network"][name]), name
    assert {path for path in storage.root.rglob("*") if "sweeps" in path.parts} == kept
    assert [line.split(":")[0] for line in printed if ": loss " in line] == [f"step {n}" for n in range(1, 7)]
    assert [line for line in printed if "eval/fd_nfe1" in line][-1].startswith("step 6: ")


def test_a_loss_that_is_not_finite_ends_it_in_a_sentence_without_a_place(storage: ProjectFolder) -> None:
    with pytest.raises(JobError, match=r"is not finite at step \d on rank 0: the update was not made\.$"):
        train_locally(small_experiment("optimizer.lr=1.0e+30"), "trial", storage, print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_trial_that_asks_for_a_gpu_says_how_to_train_without(storage: ProjectFolder) -> None:
    with pytest.raises(UserError, match=r"--set resources.gpus_per_worker=0"):
        train_locally(small_experiment("resources.gpus_per_worker=1"), "trial", storage, print)
