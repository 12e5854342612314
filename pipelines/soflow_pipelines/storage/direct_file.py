"""Large files that are written past the page cache.

A write through the page cache costs the processors several times the work of one past it, which is taken from a training or a
preparation that needs all of them, and what is written pushes files that are read again out of memory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

BLOCK = 2**23
"""Bytes that are written at a time."""
ALIGNMENT = 2**12
"""What place and length of a write past the page cache are multiples of."""
O_DIRECT: int = getattr(os, "O_DIRECT", 0)
"""0 where the system has no such flag: files are then written through the page cache."""
NOT_ACCEPTED = (errno.EINVAL, errno.EOPNOTSUPP)


def write_hashed(path: Path, parts: Iterable[np.ndarray | bytes]) -> str:
    """Write the bytes of these parts, one after the other, and return their SHA-256; they are on the disk then.

    Other threads run meanwhile. Through the page cache where the file system accepts nothing else. Raises OSError.
    """
    checksum = hashlib.sha256()
    with DirectFile(path) as file:
        for part in parts:
            content = np.frombuffer(part, np.uint8).data
            for start in range(0, len(content), BLOCK):
                piece = content[start : start + BLOCK]
                checksum.update(piece)
                file.write(piece)
        file.finish()
    return checksum.hexdigest()


class DirectFile:
    """A new file with the block that is filled for it; its bytes are on the disk after `finish`.

    Through the page cache where the file system accepts nothing else. Other threads run while it is written. Methods raise OSError.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._file = os.open(path, flags | O_DIRECT, 0o666)
        except OSError as error:
            if error.errno not in NOT_ACCEPTED:
                raise
            self._file = os.open(path, flags, 0o666)
        # Of an address that is a multiple of a page.
        self._block = mmap.mmap(-1, BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = np.frombuffer(self._block, np.uint8).ctypes.data
        self._filled = 0

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def write(self, content: bytes | memoryview) -> None:
        """Add bytes, contiguous in memory."""
        length, done = len(content), 0
        source = np.frombuffer(content, np.uint8).ctypes.data if length else 0
        while done < length:
            count = min(BLOCK - self._filled, length - done)
            # Without the GIL, which an assignment would hold.
            ctypes.memmove(self._address + self._filled, source + done, count)
            done, self._filled = done + count, self._filled + count
            if self._filled == BLOCK:
                self._write()

    def finish(self) -> None:
        """Write what is left and have all of it reach the disk."""
        self._write()
        os.fsync(self._file)

    def _write(self) -> None:
        with memoryview(self._block)[: self._filled] as view:
            done = 0
            while done < self._filled:
                if (self._filled - done) % ALIGNMENT:
                    # The end of the file, or of a write that was cut short.
                    self._through_the_cache()
                try:
                    done += os.write(self._file, view[done:])
                except OSError as error:
                    if error.errno not in NOT_ACCEPTED or not self._through_the_cache():
                        raise
        self._filled = 0

    def _through_the_cache(self) -> bool:
        """Write through the page cache from now on. Returns whether that is a change."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~O_DIRECT)
        return bool(flags & O_DIRECT)
