"""A folder of this machine as an object store."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import BinaryIO

from soflow_pipelines.storage.files import sync_folder, write_bytes
from soflow_pipelines.storage.object_store import StorageError


class LocalFolder:
    """A folder of this machine, or of a file system mounted on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._given = str(folder)

    @property
    def uri(self) -> str:
        return self._given

    def path(self, name: str) -> Path:
        return self.folder / name

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def open(self, name: str, start: int = 0) -> BinaryIO:
        try:
            file = self.path(name).open("rb")
        except OSError as error:
            raise StorageError(f"{self.path(name)} cannot be read: {error.strerror}") from error
        file.seek(start)
        return file

    def size(self, name: str) -> int | None:
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def names(self) -> list[str]:
        # Unlike Path.rglob, os.walk passes over a folder that is removed meanwhile.
        files = (Path(folder, name) for folder, _, names in os.walk(self.folder) for name in names)
        return sorted(str(path.relative_to(self.folder)) for path in files if path.is_file())

    def write(self, name: str, content: bytes) -> None:
        path = self.path(name)
        try:
            write_bytes(path, content, durable=True)
            if path.parent != self.folder:
                sync_folder(self.folder)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}") from error

    def publish(self, name: str, local: Path) -> None:
        aside = self._aside(name)
        try:
            # A rename within one file system; across two the copy is made aside.
            shutil.move(local, aside)
            os.replace(aside, self.path(name))
        except OSError as error:
            raise StorageError(f"{self.path(name)} cannot be written: {error.strerror}") from error
        finally:
            aside.unlink(missing_ok=True)

    def _aside(self, name: str) -> Path:
        path = self.path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{path.parent} cannot be made: {error.strerror}") from error
        return path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")

    def remove(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)
