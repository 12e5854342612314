"""Data sets that come with a dependency, written as shard sets on first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from soflow_pipelines.images.decode import to_array
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.sources import digits  # noqa: F401 - registers it
from soflow_pipelines.sources.source import SOURCES, Expected, Source, SourceOptions
from soflow_pipelines.storage.files import sync_folder, temporary_folder
from soflow_pipelines.storage.object_store import StorageError


class _Builtin(Mapping[str, Expected]):
    """Data sets that need no path, by name: those registered sources that say what is in them."""

    def __getitem__(self, name: str) -> Expected:
        expected = SOURCES[name].expected
        if expected is None:
            raise KeyError(name)
        return expected

    def __contains__(self, name: object) -> bool:
        return name in SOURCES and SOURCES[str(name)].expected is not None

    def __iter__(self) -> Iterator[str]:
        return (name for name in SOURCES if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


BUILTIN = _Builtin()
"""The built-in data sets, by name."""


def ensure_builtin(name: str, folder: str | Path) -> Path:
    """Writes a built-in data set as shards to a folder, unless it is there, and returns the folder.

    It is written aside and renamed, so several processes may call this at the same time. Raises ValueError for another
    name, StorageError where it cannot be written.
    """
    if name not in BUILTIN:
        raise ValueError(f"there is no built-in data set {name!r}; there is {', '.join(BUILTIN)}")
    folder = Path(folder)
    if (folder / INFO_NAME).is_file():
        return folder
    source, expected = SOURCES[name]().open(Path(), SourceOptions()), BUILTIN[name]
    channels, height, width = expected.shape
    info = DatasetInfo(
        kind="pixels",
        shape=(channels, height, width),
        dtype="uint8",
        classes=expected.classes,
        class_names=source.class_names,
        resolution=width,
        recipe={"source": name},
    )
    try:
        with temporary_folder(folder) as partial:
            write_shards(_samples(source), partial, info, total=len(source))
            partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        # Another process may have finished first: a folder that is not empty cannot be replaced.
        if not (folder / INFO_NAME).is_file():
            raise StorageError(f"{folder} cannot be written: {error}") from error
    return folder


def _samples(source: Source) -> Iterator[Sample]:
    for number in range(len(source)):
        label = None if source.labels is None else int(source.labels[number])
        yield Sample(f"{number:08d}", to_array(source.image(number)), label)
