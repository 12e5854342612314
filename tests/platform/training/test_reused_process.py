"""A trial trains the same network in a process that has trained others as in a new one, and leaves no memory behind."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import EMA, STATE
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.launch import release_memory, train_here
from soflow_platform.training.trial_status import TrialState, read_status
from tests.platform.conftest import ROOT, small_experiment
from tests.support.trained_trials import job_of

OTHERS = (
    ["objective={method: flow_matching}"],
    ["network={patch: 2, hidden: 32, depth: 2, heads: 2}", "seed=7", "training.batch=12"],
    ["training.deterministic=true", "training.ema=[0.5, 0.9]"],
)
"""Another objective; another size, seed and batch; deterministic kernels and another number of averages."""


class Process:
    """Trains trials one after the other in this process, as Tune's trial actor does."""

    def __init__(self, root: Path) -> None:
        self.storage = ProjectFolder(root)
        uri = f"sqlite:///{root / 'mlflow.db'}"
        self.tracking = Tracking.open(uri, "digits", self.storage)

    def evaluations(self, trial: str, *overrides: str) -> Any:
        experiment = small_experiment(*overrides)
        return train_here(job_of(self.storage, self.tracking, experiment, trial=trial), experiment, None)

    def train(self, trial: str, *overrides: str) -> str:
        """A digest of the trial's last checkpoint and of its evaluations."""
        evaluations = list(self.evaluations(trial, *overrides))
        release_memory()
        folder = self.storage.trial("sweep", trial) / "checkpoints" / "step-00000006"
        digest = hashlib.sha256(json.dumps(evaluations, sort_keys=True).encode())
        for name in (EMA, STATE):
            digest.update((folder / name).read_bytes())
        return digest.hexdigest()

    def prune(self, trial: str) -> None:
        with contextlib.closing(self.evaluations(trial)) as evaluations:
            next(evaluations)

    def fail(self, trial: str) -> None:
        with pytest.raises(JobError, match="not finite"):
            list(self.evaluations(trial, "optimizer.lr=1.0e+30"))


@pytest.fixture
def process(storage: ProjectFolder, tracking: Tracking) -> Process:
    del tracking
    return Process(storage.root)


def trained_after_others(root: Path) -> tuple[str, str]:
    """Digests of one trial, as the first of this process and after all others. Called in a new process."""
    torch.set_num_threads(1)
    process = Process(root)
    first = process.train("first")
    for number, overrides in enumerate(OTHERS):
        process.train(f"other-{number}", *overrides)
    process.prune("pruned")
    process.fail("failed")
    return first, process.train("again")


@pytest.mark.slow
def test_a_trial_in_a_reused_process_has_the_bits_of_a_fresh_one(
    storage: ProjectFolder, tracking: Tracking
) -> None:
    del tracking
    program = (
        "import sys; from pathlib import Path; "
        "from tests.platform.training.test_reused_process import trained_after_others; "
        "print(*trained_after_others(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(storage.root)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    first, again = done.stdout.splitlines()[-1].split()
    assert first == again


def test_evaluations_come_once_they_are_saved_and_the_last_at_the_end(process: Process) -> None:
    checkpoints = process.storage.trial("sweep", "trial") / "checkpoints"
    assert [evaluation["step"] for evaluation in process.evaluations("trial")] == [2, 4, 6]
    assert (checkpoints / "step-00000006" / STATE).is_file()
    status = read_status(process.storage.trial("sweep", "trial"))
    assert status is not None
    assert status.state is TrialState.FINISHED


def test_a_pruned_trial_keeps_the_checkpoint_it_was_judged_by(process: Process) -> None:
    before = set(threading.enumerate())
    process.prune("trial")
    folder = process.storage.trial("sweep", "trial")
    assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000002"]
    status = read_status(folder)
    assert status is not None
    assert status.state is TrialState.PRUNED
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()


@pytest.mark.slow
def test_memory_and_files_do_not_grow_over_thirty_trials(process: Process) -> None:
    me = psutil.Process()
    sizes, files = [], []
    for number in range(30):
        process.train(f"trial-{number}")
        gc.collect()
        sizes.append(me.memory_info().rss / 2**20)
        files.append(me.num_fds())
    assert sizes[-1] - sizes[9] < 20, sizes
    assert files[-1] <= files[9], files
