"""The one error of every storage."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, Protocol

from soflow_core.failures import InputError


class StorageError(InputError):
    """A place that cannot be read or written. The text names it and says what is wrong."""


class ObjectStore(Protocol):
    """A folder of files. A file is complete or absent; names may hold `/`."""

    @property
    def uri(self) -> str: ...

    def read(self, name: str) -> bytes: ...

    def open(self, name: str, start: int = 0) -> BinaryIO: ...

    def size(self, name: str) -> int | None:
        """Bytes of the file, None where there is none."""

    def names(self) -> list[str]:
        """The names of all files, sorted."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a whole file that outlives the machine's sudden end."""

    def publish(self, name: str, local: Path) -> None:
        """Moves a finished local file here under this name."""

    def remove(self, name: str) -> None: ...
