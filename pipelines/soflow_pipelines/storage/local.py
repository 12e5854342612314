"""A folder of this machine as an object store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from soflow_pipelines.storage.files import move, sync_folder, write_bytes
from soflow_pipelines.storage.object_store import StorageError


class LocalFolder:
    """A folder of this machine, or of a file system mounted on it. It is created when something is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._as_named = str(folder)

    @property
    def uri(self) -> str:
        """The folder as it was named."""
        return self._as_named

    def path(self, name: str) -> Path:
        """The absolute path of a file."""
        return self.folder / name

    def read(self, name: str) -> bytes:
        """The content of a file. Raises StorageError."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str, start: int = 0) -> BinaryIO:
        """Opens a file for reading, from the byte `start` on. Raises StorageError."""
        try:
            file = self.path(name).open("rb")
        except OSError as error:
            raise StorageError(f"{self.path(name)} cannot be read: {error.strerror}") from error
        file.seek(start)
        return file

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        path = self.path(name)
        try:
            return path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from error

    def names(self) -> list[str]:
        """The names of all files, sorted."""
        # Unlike Path.rglob, os.walk passes over a folder that is removed meanwhile.
        files = (Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names)
        return sorted(str(path.relative_to(self.folder)) for path in files if path.is_file())

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole; it is on the disk when this returns. Raises StorageError."""
        path = self.path(name)
        try:
            write_bytes(path, content, durable=True)
            self._sync_parent(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error

    def publish(self, name: str, local: Path) -> None:
        """Moves a finished local file here; it is on the disk when this returns. Raises StorageError."""
        path = self.path(name)
        try:
            move(local, path)
            self._sync_parent(path)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error

    def _sync_parent(self, path: Path) -> None:
        """Has the name of a file's own folder, which may be new, reach the disk."""
        if path.parent != self.folder:
            sync_folder(self.folder)

    def remove(self, name: str) -> None:
        """Removes a file, where there is one. Raises StorageError."""
        try:
            self.path(name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.path(name)} cannot be removed: {error.strerror}") from error
