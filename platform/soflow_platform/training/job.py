"""Everything a worker process needs to train one trial, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soflow_platform.storage.project import ProjectFolder


@dataclass(frozen=True)
class TrialJob:
    """One trial of a sweep, ready to be trained. It holds plain data alone and can be sent to any node."""

    sweep: str
    trial: str
    experiment: dict[str, Any]
    """The resolved settings: the arguments of `Experiment`."""
    data: str
    """Folder or URI of the shard set."""
    storage: str
    """The project folder."""
    tracking_uri: str
    run: str
    """MLflow run id; empty where nothing of the trial is kept."""
    start: dict[str, Any] | None = None
    """The weights that it starts from: the arguments of `Start`. None: fresh ones."""
    attempt: int = 1
    """Number of the sweep's present start, from 1."""
    until: int | None = None
    """The step at which training pauses, for others to reach it (`search.pbt`); None: it goes on to the last one."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def project(self) -> ProjectFolder:
        return ProjectFolder(Path(self.storage))

    @property
    def folder(self) -> Path:
        """The trial's folder: status, log, sample grids."""
        return self.project.trial(self.sweep, self.trial)
