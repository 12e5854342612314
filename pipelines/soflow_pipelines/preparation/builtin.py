"""soflow_pipelines.preparation.builtin"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.sources.digits import load_digits
from soflow_pipelines.storage.object_store import StorageError


def digits_samples() -> Iterator[Sample]:
    """The handwritten digits, in scikit-learn's order, which mixes the classes."""
    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        yield Sample(f"{number:08d}", image, int(label))


def ensure_builtin(name: str, folder: str | Path) -> Path:
    """The folder, holding the built-in data set as shards: written now where it is not there yet.

    Complete or absent: it is written aside and renamed, so two processes may ask at the same time.
    """
    if name != "digits":
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
        recipe={"source": "digits"},
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        write_shards(digits_samples(), aside, info, total=len(data.labels))
        aside.rename(folder)
    except OSError as error:
        if not (folder / INFO_NAME).is_file():
            raise StorageError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Expected:
    """What a configuration says of its data before it is opened."""

    shape: tuple[int, ...]
    """(C, H, W)"""
    classes: int | None


BUILTIN = {"digits": Expected((1, 8, 8), 10)}
"""Real data that comes with a dependency, by name."""
