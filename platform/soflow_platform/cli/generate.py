"""soflowctl promote and generate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from soflow_platform.errors import UserError
from soflow_platform.storage.project import ProjectFolder, find_project, require_writable

MANIFEST = "generation.json"
GRID_SIDE = 10


def generate_command(
    model: str,
    out: Path,
    num: int,
    steps: int,
    seed: int,
    label: int | None,
    storage_option: str | None,
    tracking: str | None,
) -> None:
    """Make the images that are not there yet, then the grid."""
    require_writable(ProjectFolder(out.absolute()))
    storage = find_project(storage_option)
    weights, source = _weights(model, storage, tracking)
    from soflow_platform.generation.generator import Generator

    generator = Generator.open(weights)
    settings = {"weights": source, "steps": steps, "seed": seed, "label": label}
    _claim(out, settings)
    labels = _labels(generator.classes, label, num)
    width = max(6, len(str(num - 1)))
    paths = [out / f"{i:0{width}d}{'' if labels is None else f'-label-{labels[i]}'}.png" for i in range(num)]
    missing = [i for i in range(num) if not paths[i].exists()]
    _write_missing(generator, paths, missing, labels, seed, steps)
    grid = _write_grid(paths, out)
    print(f"{len(missing)} images made, {num - len(missing)} were there: {out}")
    print(f"grid: {grid}")


def _write_missing(
    generator: Any, paths: list[Path], missing: list[int], labels: list[int] | None, seed: int, steps: int
) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from soflow_pipelines.images.encode import encode_png

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=len(missing))
        own = None if labels is None else [labels[i] for i in missing]
        done = 0
        for batch in generator.batches(missing, own, seed, steps):
            for image in batch:
                path = paths[missing[done]]
                aside = path.with_suffix(".partial")
                aside.write_bytes(encode_png(image.permute(1, 2, 0).numpy()))
                aside.replace(path)
                done += 1
            progress.update(task, completed=done)


def _write_grid(paths: list[Path], out: Path) -> Path:
    """The first images, one file."""
    import numpy as np
    import torch
    from PIL import Image

    from soflow_pipelines.images.encode import encode_png
    from soflow_platform.evaluation.evaluator import grid_image

    shown = [np.asarray(Image.open(path).convert("RGB")) for path in paths[: GRID_SIDE * GRID_SIDE]]
    images = torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)
    grid = out / "grid.png"
    grid.write_bytes(encode_png(grid_image(images, columns=GRID_SIDE)))
    return grid


def _labels(classes: int | None, label: int | None, num: int) -> list[int] | None:
    if classes is None:
        if label is not None:
            raise UserError("this network is unconditional: leave --label out.")
        return None
    return [i % classes if label is None else label for i in range(num)]


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Mark the folder with what its images are. Raises UserError where it holds others."""
    from soflow_pipelines.storage.files import read_json, write_json

    present = read_json(out / MANIFEST)
    if present is not None and present != settings:
        changed = ", ".join(key for key in settings if settings[key] != present.get(key))
        raise UserError(f"{out} holds images made with other settings ({changed}): choose another --out.")
    write_json(out / MANIFEST, settings)


def _weights(model: str, storage: ProjectFolder, tracking: str | None) -> tuple[Path, str]:
    """The weights file of a registered model, a checkpoint or a file, and a text that identifies it."""
    path = Path(model)
    if path.is_file():
        return path, str(path.absolute())
    if path.is_dir() and (path / "ema.safetensors").is_file():
        return path / "ema.safetensors", str(path.absolute())
    if "/" in model and not model.startswith("models:/"):
        raise UserError(
            f"--model {model}: there is no such file; registered models are named models:/NAME@ALIAS."
        )
    import mlflow

    from soflow_platform.registry.versions import find_version

    uri = _tracking_uri(storage, tracking)
    version = find_version(uri, model)
    mlflow.set_tracking_uri(uri)
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}"))
    return folder / "artifacts" / "ema.safetensors", f"models:/{version.name}/{version.version}"


def _tracking_uri(storage: ProjectFolder, tracking: str | None) -> str:
    """Raises UserError where the project folder has no tracking store yet."""
    if tracking is None and not (storage.root / "mlflow.db").is_file():
        raise UserError(
            f"there is no model registry under {storage.root}: run a sweep first, or pass --storage or --tracking."
        )
    return tracking or storage.tracking_uri
