"""`soflowctl generate`: a folder of PNG images from weights, and one grid of the first of them.

Image i is a function of (weights, seed, i, label, steps), so a command that was interrupted makes only the images that are missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from soflow_pipelines.images.encode import encode_png
from soflow_pipelines.storage.files import read_json, write_bytes, write_json
from soflow_platform.cluster.actor_pool import Progress, Report, no_report
from soflow_platform.errors import UserError
from soflow_platform.evaluation.evaluator import grid_image
from soflow_platform.generation.generator import Generator
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.jobs.targets import EvaluationTarget, TargetResolver
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

SETTINGS_FILE = "generation.json"
"""Settings of all images in a folder."""
GRID_FILE = "grid.png"
GRID_SIDE = 10
"""Images in a row and in a column of the grid."""


@dataclass(frozen=True)
class GeneratedFolder:
    """Result of `generate`."""

    made: int
    """Images made by this call."""
    kept: int
    """Images that were there before."""
    grid: Path


def generate(
    request: GenerateRequest,
    project: ProjectFolder,
    store: TrackingStore,
    report: Report = no_report,
) -> GeneratedFolder:
    """Make the images that are missing from the output folder, and the grid.

    Raises InputError where the model cannot be found or sampled, or the folder holds images of other settings.
    """
    with tempfile.TemporaryDirectory(prefix="soflow-weights-") as copies:
        target = TargetResolver(project, store, Path(copies), accepts_images=False).find(request.model)
        assert target.weights is not None
        generator = Generator.open(target.weights)
    labels = choose_labels(generator.classes, request.label, request.num)
    claim_folder(request.out, _settings(request, target))
    paths = image_paths(request.out, request.num, labels)
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    labels_of_missing = None if labels is None else [labels[i] for i in missing]
    made = 0
    for batch in generator.images(missing, labels_of_missing, request.seed, request.steps):
        for image in batch:
            write_bytes(paths[missing[made]], encode_png(image.permute(1, 2, 0)))
            made += 1
        report(Progress(made, len(missing)))
    grid = write_grid(paths, request.out / GRID_FILE)
    return GeneratedFolder(made, request.num - made, grid)


def _settings(request: GenerateRequest, target: EvaluationTarget) -> dict[str, Any]:
    """The settings that decide the images."""
    path = Path(target.name).expanduser()
    weights = str(path.absolute()) if path.exists() else target.name
    return {"weights": weights, "steps": request.steps, "seed": request.seed, "label": request.label}


def choose_labels(classes: int | None, label: int | None, num: int) -> list[int] | None:
    """A label for each image: the one given, else every class in turn; None for an unconditional network."""
    if classes is None:
        if label is not None:
            raise UserError("this network is unconditional: leave --label out.")
        return None
    return [i % classes if label is None else label for i in range(num)]


def image_paths(folder: Path, num: int, labels: Sequence[int] | None) -> list[Path]:
    """`000012-label-3.png`, or `000012.png` of an unconditional network."""
    width = max(6, len(str(num - 1)))
    suffixes = [""] * num if labels is None else [f"-label-{label}" for label in labels]
    return [folder / f"{i:0{width}d}{suffix}.png" for i, suffix in enumerate(suffixes)]


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a folder's images in it. Raises UserError where it holds images of other settings."""
    present = read_json(folder / SETTINGS_FILE)
    if present is not None and present != settings:
        changed = ", ".join(key for key in settings if settings[key] != present.get(key))
        raise UserError(f"{folder} holds images made with other settings ({changed}): choose another --out.")
    write_json(folder / SETTINGS_FILE, settings)


def write_grid(paths: Sequence[Path], grid: Path) -> Path:
    """Write the first GRID_SIDE x GRID_SIDE images as one file."""
    shown = [np.asarray(Image.open(path).convert("RGB")) for path in paths[: GRID_SIDE * GRID_SIDE]]
    images = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
    write_bytes(grid, encode_png(grid_image(images, columns=GRID_SIDE)))
    return grid
