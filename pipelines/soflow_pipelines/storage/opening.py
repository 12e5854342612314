"""Opens the object store behind a folder or URI."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from soflow_core.failures import printable
from soflow_pipelines.storage.files import named_when_done, temporary_folder
from soflow_pipelines.storage.http import WebFolder
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import LocationError, ObjectStore, StorageError
from soflow_pipelines.storage.s3 import S3Folder
from soflow_pipelines.storage.uris import without_secrets

CACHED_BYTES = 8 * 2**20
"""Large writes are cached in large pages, which are faster to read again."""


def open_storage(uri: str | Path) -> ObjectStore:
    """The store behind a folder, `file://`, `s3://bucket/prefix` or `https://host/path`. It is not accessed yet.

    Raises LocationError for another scheme, and for an s3:// URI without a bucket, with keys or with an unknown option.
    """
    text = str(uri)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalFolder(_local(text))
    if scheme == "file":
        return LocalFolder(_local("/" + rest.lstrip("/")))
    if scheme == "s3":
        return S3Folder(text)
    if scheme in ("http", "https"):
        return WebFolder(text)
    raise LocationError(
        f"{without_secrets(text)}: {printable(scheme)}:// is not understood; there are folders, file://, s3://, https://."
    )


def _local(text: str) -> Path:
    """A path. Raises LocationError for one that no file system can have."""
    if "\0" in text or any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")):
        raise LocationError(f"{printable(text[:80])} is not a path that a file system can have.")
    if len(os.fsencode(text)) > LONGEST_PATH:
        raise LocationError(f"{printable(text[:80])}...: the path is too long.")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise LocationError(f"{printable(text)}: there is no such user.") from None


LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes of a part of a path, and of a path, on the usual file systems."""


@contextlib.contextmanager
def staging_folder(store: ObjectStore, below: str = "") -> Iterator[Path]:
    """A temporary folder for files that are to be published to a store: inside a local one, so that they need no copy.

    Raises StorageError where it cannot be created.
    """
    parent = store.path(below) if isinstance(store, LocalFolder) else Path(tempfile.gettempdir())
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(parent / "soflow-staging"))
        except OSError as error:
            raise StorageError(f"{parent} cannot be written: {error.strerror}") from error
        yield folder


class WritableFile(Protocol):
    """What takes bytes one after the other."""

    def write(self, content: bytes | memoryview, /) -> object:
        """Adds bytes. Raises OSError."""


@contextlib.contextmanager
def staged_file(store: ObjectStore, path: Path) -> Iterator[WritableFile]:
    """Opens a large file in a staging folder of this store, which takes its name when the block ends without an exception.

    Past the page cache where the file stays on this disk; through it where it is read again, for the upload. Raises OSError.
    """
    with named_when_done(path) as partial:
        if isinstance(store, LocalFolder):
            # It needs NumPy, which commands that only read small files do not wait for.
            from soflow_pipelines.storage.direct_file import DirectFile

            with DirectFile(partial) as direct:
                yield direct
                direct.finish()
        else:
            with partial.open("wb", buffering=CACHED_BYTES) as cached:
                yield cached
