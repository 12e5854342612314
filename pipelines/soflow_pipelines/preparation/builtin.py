"""Data sets that come with a dependency, written as shard sets on first use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.sources.digits import load_digits
from soflow_pipelines.sources.source import LabelledImages
from soflow_pipelines.storage.files import sync_folder, temporary_folder
from soflow_pipelines.storage.object_store import StorageError


@dataclass(frozen=True)
class Expected:
    """Shape and classes of data that were not opened yet."""

    shape: tuple[int, ...]
    """(C, H, W)."""
    classes: int | None


BUILTIN = {"digits": Expected((1, 8, 8), 10)}
"""The built-in data sets, by name."""


def ensure_builtin(name: str, folder: str | Path) -> Path:
    """Writes a built-in data set as shards to a folder, unless it is there, and returns the folder.

    It is written aside and renamed, so several processes may call this at the same time. Raises ValueError for another
    name, StorageError where it cannot be written.
    """
    if name not in BUILTIN:
        raise ValueError(f"there is no built-in data set {name!r}; there is 'digits'")
    folder = Path(folder)
    if (folder / INFO_NAME).is_file():
        return folder
    data = load_digits()
    info = DatasetInfo(
        kind="pixels",
        shape=data.images.shape[1:],
        dtype="uint8",
        classes=len(data.class_names),
        class_names=data.class_names,
        resolution=data.images.shape[-1],
        recipe={"source": name},
    )
    try:
        with temporary_folder(folder) as partial:
            write_shards(_samples(data), partial, info, total=len(data.labels))
            partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        # Another process may have finished first: a folder that is not empty cannot be replaced.
        if not (folder / INFO_NAME).is_file():
            raise StorageError(f"{folder} cannot be written: {error}") from error
    return folder


def _samples(data: LabelledImages) -> Iterator[Sample]:
    for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        yield Sample(f"{number:08d}", image, int(label))
