"""Atomic file operations on a local file system, JSON files, and checksums.

Everything that this project publishes as a file goes through `atomic`, `move` or `move_if_absent`, so that there is one guarantee: a
reader sees the old content or the new one, never a part, whichever processes, containers and machines write to the folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

BLOCK_BYTES = 1 << 20
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
"""What file systems without hard links answer."""


@contextlib.contextmanager
def atomic(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Opens a file for writing that takes its name when the block ends without an exception.

    With `durable`, content and name are on the disk before this returns. Parent folders are created. Raises OSError.
    """
    with named_when_done(path) as partial, partial.open("wb") as file:
        yield file
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        sync_folder(path.parent)


@contextlib.contextmanager
def named_when_done(path: Path) -> Iterator[Path]:
    """A place in the same folder for a file that takes its name when the block ends without an exception.

    The place's name is random: a process id is not unique between containers. The file is removed where the block fails. Parent folders
    are created. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def move(source: Path, path: Path) -> None:
    """Moves a finished file to a path where it appears whole, and is on the disk when this returns.

    It is renamed, or copied where the two are on different file systems. Parent folders are created. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(source, path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with source.open("rb") as content, atomic(path) as target:
            shutil.copyfileobj(content, target, BLOCK_BYTES)
        source.unlink()
    else:
        sync_folder(path.parent)


def move_if_absent(source: Path, path: Path) -> bool:
    """Moves a finished file to a path of the same file system; where a file is there already, both stay and the result is False.

    Without hard links, a file that appears in the same moment is replaced. Raises OSError.
    """
    with source.open("rb") as file:
        os.fsync(file.fileno())
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if os.path.lexists(path):
            return False
        os.replace(source, path)
    else:
        source.unlink()
    sync_folder(path.parent)
    return True


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, to be renamed to it when it is complete; removed with what is left in it.

    Its name is random, as that of a temporary file of `atomic`. Parent folders are created. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


def sync_files(folder: Path, names: Iterable[str]) -> None:
    """Has files of a folder and their names reach the disk, as `durable` does for each of them. Raises OSError."""
    for name in names:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Has the names in a folder reach the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Writes a file atomically."""
    with atomic(path, durable=durable) as file:
        file.write(content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically; it is on the disk when this returns."""
    write_bytes(path, json.dumps(content, indent=1).encode(), durable=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None where there is none. Raises ValueError where it is no JSON text."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        return None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of an open file's bytes from its beginning, in hexadecimal."""
    checksum = hashlib.sha256()
    file.seek(0)
    while block := file.read(BLOCK_BYTES):
        checksum.update(block)
    return checksum.hexdigest()


def short_digest(digest: str, length: int = 16) -> str:
    """The first hexadecimal digits of a digest, with or without the name of its algorithm before it (`sha256:...`)."""
    return digest.rpartition(":")[2][:length]
