"""Locks between processes: a lock file that is held as long as a process lives, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

RETRY_SECONDS = 0.5
"""How long an attempt to lock goes on: longer than `is_locked` holds a lock in passing."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file, created where it is absent, for the length of a block.

    Gives False, and no lock, where another process holds it.
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
    """Whether some process holds the lock."""
    try:
        with path.open() as lock:
            # Shared, so that two processes that look at the same time do not take each other for the holder.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
