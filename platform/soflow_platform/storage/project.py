"""The project folder: location of data, sweeps, checkpoints, the tracking database and its artifacts.

soflow-runs/
  data/<name>/            shard sets made from built-in data
  features/               feature networks trained here, and reference statistics
  sweeps/<sweep>/         sweep.json, trials/<trial>/checkpoints/step-.../, tune/
  mlflow.db, artifacts/   tracking, unless another tracking server is named
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from soflow_platform.errors import UserError

VARIABLE = "SOFLOW_STORAGE"
DEFAULT = "soflow-runs"


@dataclass(frozen=True)
class ProjectFolder:
    """Paths below the root of a project. The properties and methods create nothing."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def features(self) -> Path:
        return self.root / "features"

    @property
    def sweeps(self) -> Path:
        return self.root / "sweeps"

    def sweep(self, sweep: str) -> Path:
        return self.sweeps / sweep

    def trial(self, sweep: str, trial: str) -> Path:
        return self.sweep(sweep) / "trials" / trial

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def tracking_uri(self) -> str:
        """URI of the embedded MLflow store, an SQLite file in the project folder."""
        return f"sqlite:///{self.root / 'mlflow.db'}"


def find_project(location: str | None) -> ProjectFolder:
    """The project folder: `location` (the option --storage), else the variable SOFLOW_STORAGE, else ./soflow-runs.

    Creates nothing. Raises UserError where the location is a URI and not a folder.
    """
    chosen = location or os.environ.get(VARIABLE) or DEFAULT
    if "://" in chosen and not chosen.startswith("file://"):
        raise UserError(
            f"storage {chosen!r} is not a folder: runs are kept on a local disk or a file system that all nodes share; "
            "pass --storage FOLDER."
        )
    return ProjectFolder(Path(chosen.removeprefix("file://")).expanduser().absolute())


def require_writable(storage: ProjectFolder) -> None:
    """Raises UserError where the project folder cannot be written. The folder is not changed."""
    reason = why_not_writable(storage.root)
    if reason is not None:
        raise UserError(
            f"storage folder {storage.root} cannot be written ({reason}); pass --storage or set {VARIABLE}."
        )


def require_writable_folder(option: str, folder: Path) -> None:
    """Raises UserError where the folder that an option names cannot be made or written. The folder is not changed."""
    reason = why_not_writable(folder)
    if reason is not None:
        raise UserError(f"{option} {folder} cannot be written ({reason}): name another folder.")


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which need not exist yet; None where something can. Nothing of the try stays."""
    try:
        folder = _existing(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".soflow-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """A folder, or the first one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
