"""The scratch folder in which a checkpoint is written before it is published, and what is said where its disk is full."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore

LITTLE_SPACE = 1 << 20
"""A write that fails on a disk with fewer free bytes than this is taken to have failed because the disk is full."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE_TEXT = os.strerror(errno.ENOSPC)


@contextlib.contextmanager
def scratch_folder(storage: ObjectStore) -> Iterator[Path]:
    """The trial's scratch folder, empty, for the length of a block; it is removed at the end."""
    place = scratch_place(storage)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, mode=0o700)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def scratch_place(storage: ObjectStore) -> Path:
    """Path of the trial's scratch folder: inside a local store, else among the temporary files.

    It is the same at each start of a trial, so that what a killed process left there is found and removed.
    """
    if isinstance(storage, LocalFolder):
        return storage.folder / ".writing"
    digest = hashlib.sha256(storage.uri.encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"soflow-writing-{os.getuid()}-{digest[:16]}"


def write_failure(error: BaseException, folder: Path) -> str:
    """One sentence on why writing the files of a checkpoint failed."""
    # A partial file still takes its space here, so that a full disk is seen even where no cause names it.
    if is_full(error) or shutil.disk_usage(folder).free < LITTLE_SPACE:
        return no_space(folder)
    return f"{type(error).__name__}: {error}"


def no_space(scratch: Path) -> str:
    """The sentence on a full disk, that of a scratch folder."""
    return f"no space is left on the disk of {scratch.parent}."


def is_full(error: BaseException) -> bool:
    """Whether an error comes of a full disk.

    torch and safetensors do not always pass on the operating system's error, or only as text: its causes are searched too.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(getattr(cause, "errno", None) in NO_SPACE or NO_SPACE_TEXT in str(cause) for cause in causes)
