"""Snapshots of a trial's power-function averages, from which an average of any length is reconstructed after training.

A snapshot is published as a checkpoint is, complete or absent, with a file of weights for each average.
"""

from __future__ import annotations

from soflow_platform.storage.checkpoints import Checkpoint, CheckpointStore
from soflow_platform.storage.project import ProjectFolder

PREFIX, SUFFIX = "power-", ".safetensors"


def snapshot_store(project: ProjectFolder, sweep: str, trial: str, base: str | None) -> CheckpointStore:
    """The snapshots of a trial; `base` is the setting training.checkpoints."""
    if base is None:
        return CheckpointStore(str(project.trial(sweep, trial) / "ema"))
    place, mark, options = base.partition("?")
    return CheckpointStore(f"{place.rstrip('/')}/{sweep}/{trial}/ema{mark}{options}")


def snapshot_file(average: str) -> str:
    """Name of the file of an average, `power-0.05`."""
    return f"{average}{SUFFIX}"


def widths_of(snapshot: Checkpoint) -> dict[float, str]:
    """Relative width of each average of a snapshot -> its file."""
    names = (file for file in snapshot.files if file.startswith(PREFIX) and file.endswith(SUFFIX))
    return {float(name.removeprefix(PREFIX).removesuffix(SUFFIX)): name for name in names}
