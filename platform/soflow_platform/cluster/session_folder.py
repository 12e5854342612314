"""The private folder in which a Ray that a command starts keeps its sockets and logs."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import time
from pathlib import Path

from soflow_platform.errors import UserError

KEPT_SECONDS = 24 * 3600.0
"""How long the folder of a session stays after its last log line, for those who look for a failure."""
LONGEST = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""Bytes of a folder's path with which Ray's sockets still have names that Linux takes."""


def session_root() -> Path:
    """The folder for the sessions of this user's Rays, which nobody else can enter; old sessions in it are removed.

    Ray itself would share one folder between all users and make it writable by all. It is below RAY_TMPDIR, TMPDIR or /tmp:
    the first whose path is short enough. Raises UserError where it belongs to somebody else or cannot be made.
    """
    private = next((folder for folder in _candidates() if len(os.fsencode(folder / "ray")) <= LONGEST), None)
    if private is None:
        raise UserError("the path of RAY_TMPDIR is too long for Ray's sockets: set one of at most 30 bytes.")
    try:
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = private.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(
                f"{private} belongs to another user, and Ray's logs would go there: set RAY_TMPDIR to a folder of your own."
            )
        if found.st_mode & 0o077:
            private.chmod(0o700)
    except OSError as error:
        raise UserError(
            f"{private}, where Ray would keep its logs, cannot be made ({error.strerror}): set RAY_TMPDIR to another folder."
        ) from None
    # Ray opens the modes of the folder that it is given, so that it gets one below the private one.
    root = private / "ray"
    _remove_old(root)
    return root


def _candidates() -> list[Path]:
    chosen = os.environ.get("RAY_TMPDIR")
    places = [chosen] if chosen else [os.environ.get("TMPDIR"), "/tmp"]
    return [Path(place).absolute() / f"soflow-{os.getuid()}" for place in places if place]


def _remove_old(root: Path) -> None:
    """Remove the sessions whose process has ended and whose logs have not been written to for KEPT_SECONDS."""
    for session in root.glob("session_*_*"):
        process = session.name.rpartition("_")[2]
        if session.is_symlink() or not process.isdecimal() or _is_running(int(process)):
            continue
        if time.time() - _last_written(session) > KEPT_SECONDS:
            shutil.rmtree(session, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _last_written(session: Path) -> float:
    """When a session's logs were last written to: a process in another container has no number here, and goes on writing."""
    with contextlib.suppress(FileNotFoundError):
        return max(path.lstat().st_mtime for path in (session, *(session / "logs").glob("*")))
    # Another command is removing it.
    return time.time()
