"""Folder of the sweep files that are installed with the package."""

from __future__ import annotations

from pathlib import Path

import soflow_platform


def sweeps_folder() -> Path:
    """The folder of the shipped sweep files: in the wheel inside the package, in a clone at its top."""
    package = Path(soflow_platform.__file__).parent
    packaged = package / "sweeps"
    return packaged if packaged.is_dir() else package.parents[1] / "sweeps"
