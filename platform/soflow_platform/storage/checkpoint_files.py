"""Files of a checkpoint, read several at a time and each in one pass: hashed, and kept where they are needed afterwards."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from soflow_pipelines.storage.files import sha256_of
from soflow_pipelines.storage.object_store import READ_BYTES

T = TypeVar("T")
R = TypeVar("R")

FILES_AT_ONCE = 4
"""Files of a checkpoint that are written, hashed, uploaded or downloaded at a time."""
STEP_BYTES = 2**20
"""Bytes that are read to memory and hashed at a time: what a processor's cache holds."""


def at_once(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Results of `work` in order, FILES_AT_ONCE items at a time. Raises what the first that failed raised, once all have ended."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(FILES_AT_ONCE, "checkpoint") as pool:
        return list(pool.map(work, items))


class KeptFiles:
    """Files of a checkpoint that were read when they were verified, in memory or in a temporary folder, until they are let go.

    Another process that the checkpoint is sent to has none of them: it reads them itself.
    """

    def __init__(self) -> None:
        self.contents: dict[str, mmap.mmap] = {}
        """By name: the whole content of a file."""
        self.copies: dict[str, Path] = {}
        """By name: a copy on this machine of a remote file."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __reduce__(self) -> tuple[type[KeptFiles], tuple[()]]:
        return KeptFiles, ()

    def make_folder(self) -> Path:
        """The folder for copies."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="soflow-checkpoint-")
        return Path(self._folder.name)

    def let_go(self) -> None:
        """Give back memory and disk, but for the memory of tensors that are still in use."""
        self.contents.clear()
        self.copies.clear()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def copy_hashed(source: BinaryIO, target: BinaryIO | None) -> str:
    """SHA-256 of a file, which is copied to `target` in the same pass, where there is one."""
    checksum = hashlib.sha256()
    while block := source.read(READ_BYTES):
        checksum.update(block)
        if target is not None:
            target.write(block)
    return checksum.hexdigest()


def read_hashed(source: Any, size: int) -> tuple[str, mmap.mmap]:
    """SHA-256 and content of an open file of `size` bytes, in one pass. The memory is this process's own, and no file's."""
    # Not a bytearray, which would be filled with zeros while no other thread runs.
    content = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    checksum, done = hashlib.sha256(), 0
    with memoryview(content) as view:
        while done < size and (count := source.readinto(view[done : min(done + STEP_BYTES, size)])):
            checksum.update(view[done : done + count])
            done += count
    return checksum.hexdigest(), content


def synced_digest(path: Path) -> str:
    """SHA-256 of a file, which is on the disk then."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return sha256_of(file)
