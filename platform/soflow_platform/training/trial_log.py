"""The log of one trial as a text file that grows by one line for each event.

    2026-11-23T22:59:01Z  step 200  loss 0.412, 310 images/s, 12 min left

Several processes may write to it, on several machines where the folder is shared; readers need nothing but the file.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from soflow_core.failures import printable

LOG = "log.txt"
"""Name of the log file in a trial's folder."""
POLL_SECONDS = 0.5
"""Interval at which `follow` checks for new lines."""
BLOCK = 1 << 16
MOMENT = len("2026-11-23T22:59:01Z")
BAR = "  | "
"""What stands before each line of a text of several lines."""


class TrialLog:
    """Appends lines to one file; its folder is created with the first line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str, step: int | None = None) -> None:
        """Append one line: the time in UTC, the optimizer step where there is one, and the text, its own line ends made into " / ".

        The operating system has the line when this returns. Raises OSError where it cannot be written.
        """
        parts = [_now(), *([] if step is None else [f"step {step}"])]
        self._append("  ".join([*parts, " / ".join(text.splitlines())]) + "\n")

    def write_block(self, text: str) -> None:
        """Append a text of several lines together, each after the time and a bar.

            2026-11-23T22:59:01Z  |   File "soflow_core/objectives/soflow.py", line 120, in loss

        Raises OSError where it cannot be written.
        """
        start = _now() + BAR
        self._append("".join(f"{start}{printable(line)}\n" for line in text.splitlines()))

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b", buffering=0) as file:
            # Appending is one operation on a local disk; over NFS only the lock makes it so.
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                # A writer was killed while it wrote a line.
                line = "\n" + line
            rest = memoryview(line.encode())
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]


@dataclass
class TrialLogReader:
    """Reads the lines appended to a log since the last read; `position` is the byte reached."""

    path: Path
    position: int = 0

    def new_lines(self) -> list[str]:
        """Complete lines that were not read yet; none where there is no file."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return []
        with file:
            if file.seek(0, os.SEEK_END) < self.position:
                # The file was replaced by a shorter one.
                self.position = 0
            file.seek(self.position)
            complete = file.read()
        complete = complete[: complete.rfind(b"\n") + 1]
        self.position += len(complete)
        return complete.decode(errors="replace").splitlines()


def read_tail(path: Path, lines: int) -> list[str]:
    """The last `lines` lines, oldest first; none where there is no file. Reads only the end of a long file.

    Where they would begin within a text of several lines, such as a traceback, the lines before them in it are returned as well.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return []
    with file:
        descriptor, end = file.fileno(), file.seek(0, os.SEEK_END)
        found = _tail(descriptor, end, lines)
        while found and found[0].find(BAR) == MOMENT:
            more = _tail(descriptor, end, 2 * len(found))
            if len(more) == len(found):
                break
            found = more[start_of_last(more, len(found)) :]
        return found


def start_of_last(lines: Sequence[str], count: int) -> int:
    """Index of the first of the last `count` lines, or of the text of several lines that it stands in."""
    start = max(0, len(lines) - count)
    while 0 < start < len(lines) and lines[start].find(BAR) == MOMENT:
        start -= 1
    return start


def follow(path: Path, stop: Callable[[], bool], lines: int = 0) -> Iterator[str]:
    """The last `lines` lines, then each new one as it comes, until `stop()` is true and all is read."""
    reader = TrialLogReader(path)
    passed = reader.new_lines()
    yield from passed[len(passed) - min(lines, len(passed)) :]
    while True:
        stopping = stop()
        yield from reader.new_lines()
        if stopping:
            return
        time.sleep(POLL_SECONDS)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _tail(descriptor: int, end: int, lines: int) -> list[str]:
    """The last lines of an open file of `end` bytes."""
    content = b""
    while end and content.count(b"\n", 0, -1) < lines:
        start = max(0, end - BLOCK)
        content = os.pread(descriptor, end - start, start) + content
        end = start
    found = content.decode(errors="replace").splitlines()
    return found[len(found) - min(lines, len(found)) :]
