"""Commands that are killed once they have got somewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from tests.support.commands import ROOT, command, environment


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 150) -> None:
    """Wait until a condition holds, as long as a command runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the command ended before it got there"
        assert time.monotonic() < deadline, "the sweep did not get there in time"
        time.sleep(0.05)


def kill_when(reached: Callable[[], bool], arguments: Sequence[str], seconds: float = 280) -> None:
    """Start a command, and kill its process (-9) as soon as it has reached what a condition says."""
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(reached, process, seconds)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
