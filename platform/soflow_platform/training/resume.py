"""Finds the checkpoint that a trial resumes from, logs damaged or missing ones, and loads its state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from soflow_core.failures import summarize
from soflow_core.weights import is_finite
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import STATE, Checkpoint, CheckpointStore
from soflow_platform.storage.retry import retry
from soflow_platform.training.state_files import opened_state
from soflow_platform.training.trial_status import TrialStatusWriter

if TYPE_CHECKING:
    from soflow_core.train_step import TrainStep


def find_resume_point(
    store: CheckpointStore, report: TrialStatusWriter, patience: float, data: str
) -> Checkpoint | None:
    """The newest undamaged checkpoint, None where training starts from step 0. Later checkpoints, all damaged, are discarded.

    `data` is the digest of the present training data. Raises JobError where it differs from that of the checkpoint, and where
    the storage is unavailable for longer than `patience` seconds.
    """
    checkpoint, damaged = retry(
        lambda: store.newest(keep=True), description=f"reading {store.root}", timeout=patience, log=report.log
    )
    for sentence in damaged:
        report.log(sentence)
    if checkpoint is not None and checkpoint.state.data not in (None, data):
        raise JobError(
            f"the checkpoint of step {checkpoint.state.step:,} was trained on data of digest {checkpoint.state.data} and the data now "
            f"has digest {data}: put that data back, or train this as another sweep."
        )
    reached = report.furthest_step()
    if checkpoint is None and reached:
        report.log(
            f"WARNING: this trial has trained to step {reached:,} and no checkpoint of it is found in {store.root}: these steps are "
            "lost, and it starts anew from step 0."
        )
    try:
        store.discard_after(checkpoint.state.step if checkpoint else 0)
    except (StorageError, OSError) as error:
        report.log(f"damaged checkpoints stay where they are: {error}")
    return checkpoint


PARTS = ("step", "total_steps", "network", "optimizer", "ema")
"""What the state of a training has."""


def load_state(checkpoint: Checkpoint, train_step: TrainStep) -> None:
    """Load a checkpoint's weights, optimizer moments and averages into a training, which is unchanged where that fails.

    Raises InputError or JobError where it is no state of this training, or holds a value that is not finite.
    """
    with opened_state(checkpoint) as state:
        # From the files to their place: on a GPU there is no room for two of a state.
        place = f"{checkpoint.location}/{STATE}"
        missing = [part for part in PARTS if not isinstance(state, dict) or part not in state]
        if missing:
            raise JobError(f"{place} is not the state of a training: it lacks {', '.join(missing)}.")
        broken = next((name for name, tensor in _tensors(state) if not is_finite(tensor)), None)
        if broken is not None:
            raise JobError(
                f"{place} has values that are not finite ({broken}), from which no training goes on: remove {checkpoint.location}, and "
                "the same command goes on from the checkpoint before it."
            )
        try:
            train_step.load_state_dict(state)
        except ValueError as error:
            raise JobError(f"{place} is not the state of this training: {summarize(error)}.") from error


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested state, with the names that lead to it."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
