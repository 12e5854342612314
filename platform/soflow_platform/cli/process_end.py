"""The end of a command's process."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import Any, NoReturn, cast

NOT_WRITTEN = 120
"""Exit code of a process whose last output could not be written, as Python has it."""


def end_process(code: object) -> NoReturn:
    """Ends the process with what a SystemExit holds, as Python does, but without finalizing Python.

    A thread that asks for Python while it is finalized is ended by force, and in compiled code that expects no such end the process
    aborts: on busy machines a command whose work was done could end by SIGABRT. What belongs to an end is done here: threads are waited
    for, functions registered for the exit are called, and output is written. Under a profiler or a debugger, which have theirs to do at
    the end, Python ends as usual.
    """
    if _watched():
        sys.exit(code)  # type: ignore[arg-type]
    cast(Any, threading)._shutdown()
    cast(Any, atexit)._run_exitfuncs()
    number = code if isinstance(code, int) else 0 if code is None else 1
    written = [_written(stream) for stream in (sys.stdout, sys.stderr)]
    os._exit(number if all(written) else number or NOT_WRITTEN)


def _watched() -> bool:
    """Whether a profiler or a debugger follows what runs."""
    monitoring = getattr(sys, "monitoring", None)
    tools = [] if monitoring is None else [monitoring.get_tool(number) for number in range(6)]
    return any(each is not None for each in (sys.gettrace(), sys.getprofile(), *tools))


def _written(stream: Any) -> bool:
    """Writes what a stream still holds; whether that went."""
    try:
        if stream is not None and not stream.closed:
            stream.flush()
    except (OSError, ValueError):
        return False
    return True
