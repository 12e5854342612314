"""Sweep files by path, or by the name of one that is installed with the package."""

from __future__ import annotations

from pathlib import Path

import soflow_platform
from soflow_platform.errors import UserError

SHOWN = 200
"""Characters of a name that an error shows."""


def sweeps_folder() -> Path:
    """The folder of the shipped sweep files: in the wheel inside the package, in a clone at its top."""
    package = Path(soflow_platform.__file__).parent
    packaged = package / "sweeps"
    return packaged if packaged.is_dir() else package.parents[1] / "sweeps"


def shipped_sweep(name: str) -> Path | None:
    """The shipped sweep file that is called `digits`, `digits.yaml` or, as in a clone, `sweeps/digits.yaml`; None where none is."""
    path = Path(name)
    if path.parent not in (Path(), Path("sweeps")):
        return None
    stem = path.stem if path.suffix == ".yaml" else path.name
    shipped = sweeps_folder() / f"{stem}.yaml"
    return shipped if shipped.is_file() else None


def find_sweep(name: str, folder: Path | None = None) -> Path:
    """A sweep file by its path, relative to `folder` (default: the working folder), or by the name of a shipped one.

    Raises UserError where there is none.
    """
    path = Path(name) if folder is None else folder / name
    try:
        found = path if path.is_file() else shipped_sweep(name)
    except OSError:
        # A name longer than a file system takes.
        found = None
    if found is None:
        known = ", ".join(sorted(each.stem for each in sweeps_folder().glob("*.yaml")))
        shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}..."
        raise UserError(
            f"there is no sweep file {shown}; give a path, or one of those that come with soflow: {known}."
        )
    return found
