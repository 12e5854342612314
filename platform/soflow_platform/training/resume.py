"""Finds the checkpoint that a trial resumes from, and logs damaged or missing ones."""

from __future__ import annotations

from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import Checkpoint, CheckpointStore
from soflow_platform.storage.retry import retry
from soflow_platform.training.trial_status import TrialStatusWriter


def find_resume_point(
    store: CheckpointStore, report: TrialStatusWriter, patience: float, data: str
) -> Checkpoint | None:
    """The newest undamaged checkpoint, None where training starts from step 0. Later checkpoints, all damaged, are discarded.

    `data` is the digest of the present training data. Raises JobError where it differs from that of the checkpoint, and where
    the storage is unavailable for longer than `patience` seconds.
    """
    checkpoint, damaged = retry(
        lambda: store.newest(), description=f"reading {store.root}", timeout=patience, log=report.log
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
