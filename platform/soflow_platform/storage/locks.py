"""File locks between processes. The operating system releases a lock when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

RETRY_SECONDS = 0.5
"""Time for which locking is retried: longer than `is_locked` holds its lock."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file, which is created where it is missing, for the length of a block.

    Yields False, without a lock, where another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        end = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    yield False
                    return
            time.sleep(0.05)
        yield True


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock of this file."""
    try:
        with path.open() as lock:
            # A shared lock, so that two processes that call this at the same time do not see each other's lock.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
