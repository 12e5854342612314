"""A trial's checkpoints, in a folder or in S3: complete or absent, verified when read.

step-00000200/
  state.pt           TrainStep's state: network, EMAs, optimizer, step
  ema.safetensors    the first EMA's weights, as they are registered
  checkpoint.json    step, images seen, run, evaluations so far, checksums

`checkpoint.json` is written last: a step without it does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from soflow_pipelines.storage import LocalFolder, Storage, StorageError, open_storage
from soflow_platform.storage import Storage as ProjectFolder

STATE = "state.pt"
EMA = "ema.safetensors"
RECORD = "checkpoint.json"
BLOCK = 1 << 20
LITTLE_SPACE = 1 << 20
"""Bytes; a failed write on a disk with less than this failed for want of space."""


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
    unsent: list[Any] = field(default_factory=list)
    """Points of the run's curves that the tracking server may not have."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    storage: Storage
    name: str
    position: Position
    files: dict[str, str]
    """SHA-256 of each file."""

    @property
    def location(self) -> str:
        """Folder or URI."""
        place, mark, options = self.storage.uri.partition("?")
        return f"{place.rstrip('/')}/{self.name}{mark}{options}"

    @contextlib.contextmanager
    def opened(self, file: str) -> Iterator[Path]:
        """One of its files as a local path for the length of a block, fetched where it lies elsewhere.

        Raises StorageError where its content is not what was written.
        """
        if isinstance(self.storage, LocalFolder):
            yield self.storage.path(f"{self.name}/{file}")
            return
        with tempfile.TemporaryDirectory(prefix="soflow-checkpoint-") as folder:
            path = Path(folder) / file
            with self.storage.open(f"{self.name}/{file}") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, BLOCK)
            with path.open("rb") as content:
                if _sha256(content) != self.files[file]:
                    raise StorageError(f"{self.location}/{file} is damaged: its checksum differs.")
            yield path

    def broken_files(self) -> list[str]:
        """Names of the files whose content is not what was written. Raises StorageError where the storage is away."""
        broken = []
        present = set(self.storage.names())
        for file, digest in self.files.items():
            if f"{self.name}/{file}" not in present:
                broken.append(file)
                continue
            with self.storage.open(f"{self.name}/{file}") as content:
                if _sha256(content) != digest:
                    broken.append(file)
        return broken


def trial_root(base: str | None, project: ProjectFolder, sweep: str, trial: str) -> str:
    """Folder or URI of one trial's checkpoints: below `base`, the setting training.checkpoints, or in the project folder."""
    if base is None:
        return str(project.trial(sweep, trial) / "checkpoints")
    place, mark, options = base.partition("?")
    return f"{place.rstrip('/')}/{sweep}/{trial}{mark}{options}"


def publish(root: str | Path, position: Position, write: Callable[[Path], None]) -> Checkpoint:
    """Write a checkpoint aside with `write(folder)`, then file by file into its place, its record last.

    Raises StorageError or OSError where it cannot be written; nothing of it counts then.
    """
    storage = open_storage(root)
    name = f"step-{position.step:08d}"
    with _scratch(storage) as aside:
        try:
            write(aside)
        except Exception as error:
            # The writers of tensors hide what the system said.
            if shutil.disk_usage(aside).free < LITTLE_SPACE:
                raise StorageError(f"no space is left on the disk of {aside.parent}.") from error
            raise
        files = {}
        for path in sorted(aside.iterdir()):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                files[path.name] = _sha256(file)
        # Once its record is gone an earlier checkpoint of the same step is no checkpoint, so that the files of two are never mixed.
        storage.remove(f"{name}/{RECORD}")
        for file_name in files:
            storage.publish(f"{name}/{file_name}", aside / file_name)
    record = {**asdict(position), "files": files}
    storage.write(f"{name}/{RECORD}", json.dumps(record, indent=1).encode())
    return Checkpoint(storage, name, position, files)


def published(root: str | Path) -> list[Checkpoint]:
    """Every complete checkpoint, oldest first; their content is not read."""
    storage = open_storage(root)
    if isinstance(storage, LocalFolder) and not storage.folder.is_dir():
        return []
    found = []
    for path in storage.names():
        name, _, file = path.partition("/")
        if file != RECORD or not name.startswith("step-"):
            continue
        record = json.loads(storage.read(path))
        files = record.pop("files")
        found.append(Checkpoint(storage, name, Position(**record), files))
    return found


def newest(root: str | Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose content is what was written, and a sentence for each damaged one passed over."""
    damaged: list[str] = []
    for checkpoint in reversed(published(root)):
        broken = checkpoint.broken_files()
        if not broken:
            return checkpoint, damaged
        damaged.append(
            f"{checkpoint.name} is damaged ({', '.join(broken)}): going back to the one before it."
        )
    return None, damaged


def prune(root: str | Path, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and what interrupted writing left behind."""
    storage = open_storage(root)
    complete = published(root)
    kept = {c.name for c in complete[-keep:]} | {c.name for c in complete if c.position.step == best_step}
    for path in sorted(storage.names(), key=lambda path: not path.endswith(RECORD)):
        name = path.partition("/")[0]
        if name.startswith("step-") and name not in kept:
            storage.remove(path)
    if isinstance(storage, LocalFolder):
        for folder in storage.folder.glob("step-*"):
            if folder.name not in kept:
                shutil.rmtree(folder)


def best_evaluation(evaluations: list[dict[str, Any]], metric: str, mode: str) -> dict[str, Any] | None:
    """The evaluation with the best value of `metric`; NaN is never best."""
    scored = [e for e in evaluations if e.get(metric) is not None and e[metric] == e[metric]]
    if not scored:
        return None
    return (min if mode == "min" else max)(scored, key=lambda e: e[metric])


@contextlib.contextmanager
def _scratch(storage: Storage) -> Iterator[Path]:
    """An empty folder on the file system that the files will be moved to, or a temporary one."""
    place = None
    if isinstance(storage, LocalFolder):
        place = storage.folder
        place.mkdir(parents=True, exist_ok=True)
        for left in place.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=place) as folder:
        yield Path(folder)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()
