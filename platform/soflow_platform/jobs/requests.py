"""Requests of the commands that score and generate images, as frozen dataclasses that import nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class GenerateRequest:
    """Request of `soflowctl generate`."""

    model: str
    """Name of the weights, as `jobs.targets` resolves it."""
    out: Path
    """Folder for the images."""
    num: int = 100
    steps: int = 1
    seed: int = 0
    label: int | None = None
    """Class of all images. None: every class in turn."""
