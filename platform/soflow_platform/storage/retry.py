"""Waiting out an outage: what fails because a server or a disk is away is tried again for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from soflow_core.failures import summarize
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import JobError

T = TypeVar("T")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0


def retry(
    action: Callable[[], T],
    what: str,
    seconds: float,
    say: Callable[[str], None],
    passing: Callable[[Exception], bool] = lambda error: isinstance(error, (StorageError, OSError)),
    cancelled: threading.Event | None = None,
) -> T:
    """Run `action` until it succeeds; pauses grow from half a second to fifteen.

    `passing` tells an outage from a mistake, which is raised at once. `say` hears of the first failure and of the recovery.
    Raises JobError naming `what` once `seconds` have gone by, or where `cancelled` is set.
    """
    started = time.monotonic()
    pause, failed = FIRST_PAUSE, False
    cancelled = cancelled or threading.Event()
    while True:
        try:
            result = action()
        except Exception as error:
            if not passing(error):
                raise
            reason = summarize(error)
            waited = time.monotonic() - started
            if waited >= seconds or cancelled.is_set():
                raise JobError(f"{what} failed for {waited:.0f} s: {reason}") from error
            if not failed:
                failed = True
                say(f"{what} failed ({reason}); trying again for {seconds / 60:.3g} min")
            cancelled.wait(min(pause, max(0.0, seconds - waited)))
            pause = min(2 * pause, LONGEST_PAUSE)
            continue
        if failed:
            say(f"{what} succeeded after {time.monotonic() - started:.0f} s")
        return result
