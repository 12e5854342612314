"""Opens the image source behind a name or path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from soflow_core.registration import register
from soflow_pipelines.sources import digits  # noqa: F401 - registers it
from soflow_pipelines.sources.cifar10 import CIFAR10_CLASSES, Cifar10Archive
from soflow_pipelines.sources.files import FolderSource, ZipSource, open_zip
from soflow_pipelines.sources.generated import open_generated
from soflow_pipelines.sources.hdf5 import Hdf5Latents
from soflow_pipelines.sources.listing import (
    HDF5_SUFFIXES,
    is_leftover,
    refuse_foreign_files,
    refuse_foreign_folder,
)
from soflow_pipelines.sources.parquet import ParquetSource
from soflow_pipelines.sources.source import SOURCES, Source, SourceError, SourceKind, SourceOptions
from soflow_pipelines.sources.webdataset import TarKeys, TarSource


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split: in ImageNet's tree, directly below the folder, or the folder itself."""
    for below in (f"ILSVRC/Data/CLS-LOC/{split}", f"Data/CLS-LOC/{split}", split):
        if (folder / below).is_dir():
            return folder / below
    return folder


def split_prefix(archive: Path, split: str) -> str:
    """The path in a zip file, with its slash, below which the class folders of a split are. Raises SourceError."""
    with open_zip(archive) as opened:
        names = [name for name in opened.namelist() if not is_leftover(name.rstrip("/"))]
    for below in (f"ILSVRC/Data/CLS-LOC/{split}/", f"Data/CLS-LOC/{split}/", f"{split}/"):
        if any(name.startswith(below) for name in names):
            return below
    tops = {name.split("/")[0] for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    if top and any(name.startswith(f"{top}/{split}/") for name in names):
        return f"{top}/{split}/"
    return ""


def named_kind(text: str) -> tuple[str | None, str]:
    """The registered name that a source begins with, and the path behind its colon; None for a path alone."""
    name, _, place = text.partition(":")
    if place.startswith("//") or name not in SOURCES:
        return None, text
    if not place and SOURCES[name].expected is None and _exists(Path(text)):
        # A folder of that name; the kind would need a path.
        return None, text
    return name, place


def source_path(text: str) -> Path:
    """The file or folder of a source."""
    name, place = named_kind(text)
    return Path(place if name is not None else text).expanduser()


def absolute_source(text: str) -> str:
    """A source with an absolute path, for processes with another working folder."""
    name, place = named_kind(text)
    if name is not None:
        return f"{name}:{Path(place).expanduser().absolute()}" if place else text
    return str(source_path(text).absolute())


def open_source(text: str, options: SourceOptions | None = None) -> Source:
    """The source of a registered name (`digits`, `cifar10:PATH`, `NAME:PATH`), or at a path: an image folder, ImageNet's tree, a zip,
    Parquet, WebDataset shards, HDF5 latents.

    Raises SourceError.
    """
    options = options or SourceOptions()
    name, place = named_kind(text)
    if name is None:
        return _open_path(source_path(text), options)
    if not place and SOURCES[name].expected is None:
        raise SourceError(f"{text} says no path: give {name}:PATH.")
    return SOURCES[name]().open(Path(place).expanduser(), options)


@register("cifar10")
@dataclass(frozen=True)
class Cifar10(SourceKind):
    """CIFAR-10, 32 x 32 in ten classes: its binary archive, or its images in any form that has a folder or a file."""

    def open(self, path: Path, options: SourceOptions) -> Source:
        source = _open_path(path, options, cifar10=True)
        source.resolution = 32
        return source

    @classmethod
    def example(cls, folder: Path) -> Path:
        """Two images of each class, with one pixel that says which."""
        for label, name in enumerate(CIFAR10_CLASSES):
            (folder / name).mkdir()
            for number in range(2):
                image = Image.new("RGB", (32, 32), (label, number, 0))
                image.save(folder / name / f"{number:04d}.png")
        return folder


def _open_path(path: Path, options: SourceOptions, cifar10: bool = False) -> Source:
    if not _exists(path):
        raise SourceError(
            f"{path} does not exist; a source is a path, or one of {', '.join(map(_usage, SOURCES))}."
        )
    name = f"cifar10:{path.name}" if cifar10 else path.name
    opened = _open_folder if path.is_dir() else _open_file
    return opened(path, name, cifar10, options)


def _usage(name: str) -> str:
    """How a kind of source is named: with a path where it needs one."""
    return f"`{name}`" if SOURCES[name].expected is not None else f"`{name}:PATH`"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _open_folder(path: Path, name: str, cifar10: bool, options: SourceOptions) -> Source:
    try:
        names = os.listdir(path)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}.") from error
    generated = open_generated(path, name, options.unlabelled, options.limits)
    if generated is not None:
        return generated
    tars = sorted(path / tar for tar in names if tar.endswith(".tar") and not is_leftover(tar))
    if tars:
        return _open_tars(tars, name, options)
    tables = sorted(
        table for table in path.rglob("*.parquet") if not is_leftover(table.relative_to(path).as_posix())
    )
    if tables:
        chosen = [table for table in tables if table.name.startswith(options.split)]
        return _open_tables(chosen or tables, name, options)
    refuse_foreign_folder(path, names)
    classes = CIFAR10_CLASSES if cifar10 else None
    root = split_folder(path, options.split)
    return FolderSource(root, name, classes, options.limits, options.unlabelled, options.follow_links)


def _open_file(path: Path, name: str, cifar10: bool, options: SourceOptions) -> Source:
    if path.suffix == ".zip":
        classes = CIFAR10_CLASSES if cifar10 else None
        prefix = split_prefix(path, options.split)
        return ZipSource(path, prefix, name, classes, options.limits, options.unlabelled)
    if path.suffix == ".parquet":
        return _open_tables([path], name, options)
    if cifar10 and path.name.endswith((".tar.gz", ".tgz")):
        return Cifar10Archive(path, name, options.split)
    if path.suffix == ".tar":
        return _open_tars([path], name, options)
    if path.suffix.lower() in HDF5_SUFFIXES:
        return Hdf5Latents(path, name, options.unlabelled, options.limits)
    refuse_foreign_files(path, [path.name])
    raise SourceError(f"{path} is no folder, .zip, .parquet, .tar or .h5.")


def _open_tars(files: list[Path], name: str, options: SourceOptions) -> Source:
    keys = TarKeys(options.image_key, options.label_key, options.unlabelled)
    return TarSource(files, name, keys, options.limits)


def _open_tables(files: list[Path], name: str, options: SourceOptions) -> Source:
    return ParquetSource(
        files, name, options.image_column, options.label_column, options.unlabelled, options.limits
    )
