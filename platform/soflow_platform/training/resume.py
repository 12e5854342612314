"""Where a trial goes on: its newest sound checkpoint, and what has to be said where that is not what was expected."""

from __future__ import annotations

from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import JobError
from soflow_platform.storage.checkpoints import Checkpoint, CheckpointStore
from soflow_platform.storage.retry import retry
from soflow_platform.training.trial_status import TrialStatusWriter


def find_resume_point(
    store: CheckpointStore, report: TrialStatusWriter, patience: float, data: str
) -> Checkpoint | None:
    """The checkpoint that training goes on from, None where it begins; damaged ones after it count no more.

    `data` is the digest of the data that is there now. Raises JobError where it is not that of the checkpoint, and where the
    storage stays away for `patience` seconds.
    """
    found, damaged = retry(
        lambda: store.newest(), description=f"reading {store.root}", timeout=patience, log=report.log
    )
    for sentence in damaged:
        report.log(sentence)
    if found is not None and found.state.data not in (None, data):
        raise JobError(
            f"the checkpoint of step {found.state.step:,} was trained on data of digest {found.state.data} and the data now "
            f"has digest {data}: put that data back, or train this as another sweep."
        )
    reached = report.furthest_step()
    if found is None and reached:
        report.log(
            f"WARNING: this trial has trained to step {reached:,} and no checkpoint of it is found in {store.root}: these steps are "
            "lost, and it starts anew from step 0."
        )
    try:
        store.discard_after(found.state.step if found else 0)
    except (StorageError, OSError) as error:
        report.log(f"damaged checkpoints stay where they are: {error}")
    return found
