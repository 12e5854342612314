"""Opens the image source behind a name or path."""

from __future__ import annotations

from pathlib import Path

from soflow_pipelines.sources.cifar10 import CIFAR10, CIFAR10_CLASSES, Cifar10Archive
from soflow_pipelines.sources.digits import load_digits
from soflow_pipelines.sources.files import FolderSource, ZipSource, open_zip
from soflow_pipelines.sources.parquet import ParquetSource
from soflow_pipelines.sources.source import ArraySource, Source, SourceError
from soflow_pipelines.sources.webdataset import TarSource


def split_folder(folder: Path, split: str) -> Path:
    """The folder of a split: in ImageNet's tree, directly below the folder, or the folder itself."""
    for below in (f"ILSVRC/Data/CLS-LOC/{split}", f"Data/CLS-LOC/{split}", split):
        if (folder / below).is_dir():
            return folder / below
    return folder


def split_prefix(archive: Path, split: str) -> str:
    """The path in a zip file, with its slash, below which the class folders of a split are. Raises SourceError."""
    with open_zip(archive) as opened:
        names = opened.namelist()
    for below in (f"ILSVRC/Data/CLS-LOC/{split}/", f"Data/CLS-LOC/{split}/", f"{split}/"):
        if any(name.startswith(below) for name in names):
            return below
    tops = {name.split("/")[0] for name in names}
    top = tops.pop() if len(tops) == 1 else ""
    if top and any(name.startswith(f"{top}/{split}/") for name in names):
        return f"{top}/{split}/"
    return ""


def source_path(text: str) -> Path:
    """The file or folder of a source."""
    return Path(text.removeprefix(CIFAR10)).expanduser()


def absolute_source(text: str) -> str:
    """A source with an absolute path, for processes with another working folder."""
    if text == "digits":
        return text
    return (CIFAR10 if text.startswith(CIFAR10) else "") + str(source_path(text).absolute())


def open_source(
    text: str, split: str = "train", image_column: str | None = None, label_column: str | None = None
) -> Source:
    """The source named `digits` or `cifar10:PATH`, or at a path: an image folder, ImageNet's tree, a zip, Parquet, WebDataset shards.

    `split` chooses among several that a source may have; the columns are those of Parquet. Raises SourceError.
    """
    if text == "digits":
        return ArraySource("digits", load_digits())
    cifar10, path = text.startswith(CIFAR10), source_path(text)
    if not path.exists():
        raise SourceError(f"{path} does not exist; a source is a path, `digits` or `cifar10:PATH`.")
    classes = CIFAR10_CLASSES if cifar10 else None
    name = f"cifar10:{path.name}" if cifar10 else path.name
    source: Source
    if path.is_dir():
        tars, tables = sorted(path.glob("*.tar")), sorted(path.rglob("*.parquet"))
        if tars:
            source = TarSource(tars, name)
        elif tables:
            chosen = [table for table in tables if table.name.startswith(split)]
            source = ParquetSource(chosen or tables, name, image_column, label_column)
        else:
            source = FolderSource(split_folder(path, split), name, classes)
    elif path.suffix == ".zip":
        source = ZipSource(path, split_prefix(path, split), name, classes)
    elif path.suffix == ".parquet":
        source = ParquetSource([path], name, image_column, label_column)
    elif cifar10 and path.name.endswith((".tar.gz", ".tgz")):
        source = Cifar10Archive(path, name, split)
    elif path.suffix == ".tar":
        source = TarSource([path], name)
    else:
        raise SourceError(f"{path} is no folder, .zip, .parquet or .tar.")
    if cifar10:
        source.resolution = 32
    return source
