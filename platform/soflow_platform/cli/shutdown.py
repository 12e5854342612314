"""What ends `soflowctl run` before its sweep does: signals, which let the trials save, and a Ray that dies, which is started again."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from soflow_platform.errors import Stopped
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.training.stop_request import request_stop

if TYPE_CHECKING:
    from soflow_platform.cli.display import SweepDisplay

T = TypeVar("T")

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes."""
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def restart_lost_ray(
    run: Callable[[], T], restarts: int, say: Callable[[str], None], stopped: Callable[[], bool]
) -> T:
    """The result of `run`, which is started again up to `restarts` times where the Ray of this command has died.

    Raises Stopped where the sweep was asked to stop before: what ends all of a command's processes ends its Ray as well, and a new
    start would take the request for one that was meant for the start before.
    """
    from soflow_platform.cluster.connection import RayLost

    while restarts > 0:
        restarts -= 1
        try:
            return run()
        except RayLost as error:
            if stopped():
                raise Stopped(str(error)) from error
            say(f"{error} Starting Ray again.")
    return run()


class GracefulShutdown:
    """While a block runs, SIGTERM, SIGHUP and Ctrl-C ask the trials to save and stop.

    A second signal, or `grace` seconds gone by, ends the block at once. Either way what is open is closed, and the exit code says why:
    143, or 130 for Ctrl-C. The signal handlers that were installed before are restored when the block ends.
    """

    def __init__(self, storage: ProjectFolder, sweep: str, display: SweepDisplay, grace: float) -> None:
        self._storage, self._sweep, self._display, self._grace = storage, sweep, display, grace
        self._handlers: dict[int, Any] = {}
        self.requested: int | None = None
        """The first signal that came."""

    @property
    def exit_code(self) -> int:
        """0 where no signal came."""
        if self.requested is None:
            return 0
        return INTERRUPTED if self.requested == signal.SIGINT else TERMINATED

    def __enter__(self) -> GracefulShutdown:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                # Under nohup a hang-up stays ignored.
                self._handlers[number] = signal.signal(number, self._on_signal)
        self._handlers[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._exit)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, trace
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self.exit_code and isinstance(error, (SystemExit, Stopped)):
            if isinstance(error, Stopped):
                print(f"soflowctl: stopped: {error}", file=sys.stderr)
            # An exit inside one of Ray's calls comes out of it with Ray's own code.
            raise SystemExit(self.exit_code) from None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = self.requested is None, self.requested or number
        if not first or not self._display.training:
            print("ended at once: run the same command to go on.", file=sys.stderr)
            self._exit(number, frame)
        if number == signal.SIGHUP:
            _leave_terminal()
        print("asked to stop: trials finish their step and save; once more ends at once.", file=sys.stderr)
        request_stop(self._storage, self._sweep)
        signal.setitimer(signal.ITIMER_REAL, self._grace)

    def _exit(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        raise SystemExit(self.exit_code)


def _leave_terminal() -> None:
    """Send what would go to a terminal that is gone to the null device: writing there fails."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
