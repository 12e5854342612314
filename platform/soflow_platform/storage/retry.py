"""Retries operations with exponential backoff while a server, an object store or a disk is unavailable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from soflow_core.failures import summarize
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.errors import JobError

if TYPE_CHECKING:
    from tenacity import RetryCallState

T = TypeVar("T")

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0
"""Longest pause between attempts in seconds; each pause is twice the one before, up to this."""


Report = Callable[[str | None], None]
"""Takes what keeps an operation from succeeding, and None once it succeeds."""


def unreported(trouble: str | None) -> None:
    """The report that goes nowhere."""
    del trouble


def is_storage_outage(error: Exception) -> bool:
    """Whether the error is a failure of an object store or a disk."""
    return isinstance(error, (StorageError, OSError))


def retry(
    action: Callable[[], T],
    *,
    description: str,
    timeout: float,
    log: Callable[[str], None],
    report: Report = unreported,
    is_transient: Callable[[Exception], bool] = is_storage_outage,
    cancel: threading.Event | None = None,
) -> T:
    """Run `action` until it succeeds, for `timeout` seconds at most, and return its result. Logs the first failure and the recovery.
    `report` has the failure as long as it lasts, also where it is given up.

    Raises an error that is not transient at once, and JobError with the description and the last error after `timeout` seconds or
    once `cancel` is set.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential
    from tenacity.nap import sleep_using_event
    from tenacity.stop import stop_when_event_set

    cancel = cancel or threading.Event()
    backoff = wait_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE)

    def pause(state: RetryCallState) -> float:
        return min(backoff(state), max(0.0, timeout - _seconds(state)))

    def log_first_failure(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            reason = summarize(_error(state))
            trouble = f"{description} failed ({reason}); trying again for {timeout / 60:.3g} min"
            log(trouble)
            report(trouble)

    def give_up(state: RetryCallState) -> NoReturn:
        error = _error(state)
        trouble = f"{description} failed for {_seconds(state):.0f} s: {summarize(error)}"
        report(trouble)
        raise JobError(trouble) from error

    def is_retried(error: BaseException) -> bool:
        return isinstance(error, Exception) and is_transient(error)

    attempts = Retrying(
        retry=retry_if_exception(is_retried),
        wait=pause,
        stop=stop_after_delay(timeout) | stop_when_event_set(cancel),
        sleep=sleep_using_event(cancel),
        before_sleep=log_first_failure,
        retry_error_callback=give_up,
    )

    started = time.monotonic()
    result = attempts(action)
    report(None)
    if attempts.statistics["attempt_number"] > 1:
        log(f"{description} succeeded after {time.monotonic() - started:.0f} s")
    return result


def _seconds(state: RetryCallState) -> float:
    """Seconds since the first attempt."""
    return state.seconds_since_start or 0.0


def _error(state: RetryCallState) -> BaseException:
    """The error of an attempt that failed."""
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error
