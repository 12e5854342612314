"""A trial's checkpoints: folders that are complete or absent, verified when read.

checkpoints/step-00000200/
  state.pt           TrainStep's state: network, EMAs, optimizer, step
  ema.safetensors    the first EMA's weights, as they are registered
  checkpoint.json    step, images seen, loader position, evaluations so far, checksums
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soflow_platform.storage import read_json, write_json

STATE = "state.pt"
EMA = "ema.safetensors"
RECORD = "checkpoint.json"


@dataclass(frozen=True)
class Position:
    """Where a trial stands, beside the state of its tensors."""

    step: int
    """Finished optimizer steps."""
    images: int
    """Samples seen, over all ranks: the loader's position."""
    run: str
    """MLflow run id."""
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Every evaluation so far: its step and its metrics."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    folder: Path
    position: Position

    @property
    def state(self) -> Path:
        return self.folder / STATE

    @property
    def ema(self) -> Path:
        return self.folder / EMA


def publish(root: Path, position: Position, write: Callable[[Path], None]) -> Checkpoint:
    """Write a checkpoint aside with `write(folder)`, seal it with checksums, then give it its name."""
    final = root / f"step-{position.step:08d}"
    aside = root / f".writing-{final.name}-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        for path in aside.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        files = {path.name: _sha256(path) for path in sorted(aside.iterdir())}
        write_json(aside / RECORD, {**asdict(position), "files": files})
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Checkpoint(final, position)


def published(root: Path) -> list[Checkpoint]:
    """Every complete checkpoint, oldest first; their content is not read."""
    found = []
    for folder in sorted(root.glob("step-*")):
        record = read_json(folder / RECORD)
        if record is not None:
            record.pop("files")
            found.append(Checkpoint(folder, Position(**record)))
    return found


def newest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose content is what was written, and a sentence for each damaged one passed over."""
    damaged: list[str] = []
    for checkpoint in reversed(published(root)):
        broken = _broken_files(checkpoint.folder)
        if not broken:
            return checkpoint, damaged
        damaged.append(
            f"{checkpoint.folder.name} is damaged ({', '.join(broken)}): going back to the one before it."
        )
    return None, damaged


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for checkpoint in published(root)[:-keep]:
        if checkpoint.position.step != best_step:
            shutil.rmtree(checkpoint.folder)


def best_evaluation(evaluations: list[dict[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    """The evaluation with the best value of `metric`; NaN is never best."""
    scored = [e for e in evaluations if e.get(metric) is not None and e[metric] == e[metric]]
    if not scored:
        return None
    return (min if mode == "min" else max)(scored, key=lambda e: e[metric])


def _broken_files(folder: Path) -> list[str]:
    record = read_json(folder / RECORD) or {"files": {RECORD: ""}}
    return [
        name
        for name, digest in record["files"].items()
        if not (folder / name).is_file() or _sha256(folder / name) != digest
    ]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
