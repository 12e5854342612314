"""Commands in the process of the test, where what they import is imported already: seconds less than in one of their own."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import pytest

from soflow_platform.cli.main import main


def run_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command through the console entry point, with its exit code and what it printed.

    What shows in a process alone (imports, signals, what a start of Python brings) needs `commands.command`.
    """
    words = ["soflowctl", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setenv("COLUMNS", "200")
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
    return subprocess.CompletedProcess(words, int(ended.value.code or 0), out.getvalue(), err.getvalue())
