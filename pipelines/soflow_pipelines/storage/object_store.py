"""The interface of every object store, and its error."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, Protocol

from soflow_core.failures import InputError, summarize

READ_BYTES = 8 * 2**20


class StorageError(InputError):
    """An object store that cannot be read or written. The text names the file or folder and says what is wrong."""


class LocationError(InputError):
    """A URI or setting that names no usable place. Unlike a StorageError, it is the same however often it is tried."""


class ObjectStore(Protocol):
    """A folder of files, local or remote. A file is complete or absent; names may hold `/`. All methods raise StorageError."""

    @property
    def uri(self) -> str:
        """The folder or URI that the store was opened with."""

    def read(self, name: str) -> bytes:
        """The content of a file."""

    def open(self, name: str, start: int = 0) -> BinaryIO:
        """Opens a file for reading, from the byte `start` on."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""

    def names(self) -> list[str]:
        """The names of all files, sorted."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole; it is on the disk when this returns."""

    def publish(self, name: str, local: Path) -> None:
        """Moves a finished local file here under this name; it is on the disk when this returns."""

    def remove(self, name: str) -> None:
        """Removes a file, where there is one."""


def read_at_most(store: ObjectStore, name: str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes; of a larger one no more than that is read.

    Raises StorageError where it cannot be read, ValueError where it is larger.
    """
    parts: list[bytes] = []
    size = 0
    try:
        with store.open(name) as file:
            while part := file.read(min(READ_BYTES, limit + 1 - size)):
                parts.append(part)
                size += len(part)
                if size > limit:
                    raise ValueError(f"it has more than {limit} bytes")
    except (OSError, HTTPException) as error:
        raise StorageError(f"{store.uri}/{name} cannot be read: {summarize(error)}.") from error
    return b"".join(parts)
