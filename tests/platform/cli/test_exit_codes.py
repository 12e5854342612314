"""Each kind of failure has its exit code and its word at the beginning of the sentence on stderr."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

from soflow_core.failures import InputError
from soflow_pipelines.shards.info import ShardError
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.cli import main as cli
from soflow_platform.errors import JobError, Stopped, UserError

FAILURES: list[tuple[BaseException, int, str]] = [
    (UserError("no such sweep."), 2, "error: no such sweep."),
    (InputError("a label is missing."), 2, "error: a label is missing."),
    (ShardError("shard 3 is damaged."), 2, "error: shard 3 is damaged."),
    (typer.BadParameter("7 is too many"), 2, "usage: Invalid value: 7 is too many"),
    (JobError("block 3 failed."), 1, "failed: block 3 failed."),
    (StorageError("s3://bucket is away."), 1, "failed: s3://bucket is away; the same command goes on once"),
    (
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs"),
        1,
        "failed: /runs cannot be written or read: No space left on device; the same command goes on once",
    ),
    (
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/runs"),
        2,
        "error: /runs cannot be used: Permission denied; name another place",
    ),
    (Stopped("trials are saved."), 143, "stopped: trials are saved."),
    (KeyError("step"), 1, "internal error: 'step'"),
    (RuntimeError(), 1, "internal error: RuntimeError"),
]


def failing(error: BaseException) -> Callable[..., Any]:
    def app(**_: Any) -> None:
        raise error

    return app


@pytest.mark.parametrize(("error", "code", "message"), FAILURES, ids=lambda value: type(value).__name__)
def test_a_failure_has_its_exit_code_and_its_sentence(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "app", failing(error))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith(f"soflowctl: {message}")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), typer.Abort()], ids=["signal", "prompt"])
def test_an_interrupted_command_ends_with_130(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", failing(error))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted: run the same command to go on.\n"


def test_a_command_that_succeeds_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "app", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0


def test_a_crash_of_compiled_code_names_what_each_thread_was_doing() -> None:
    program = (
        "import contextlib, os, sys, threading, time\n"
        "from soflow_platform.cli.main import main\n"
        "sys.argv = ['soflowctl', 'version']\n"
        "def waits(): time.sleep(60)\n"
        "threading.Thread(target=waits, daemon=True).start()\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main()\n"
        "os.abort()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert done.stdout.startswith("soflow ")
    assert "Fatal Python error: Aborted" in done.stderr
    assert "in waits" in done.stderr


def ended_process(before: str, code: str) -> subprocess.CompletedProcess[str]:
    """A process of `soflowctl version` after other lines, whose exit code is set."""
    lines = (
        "import atexit, sys, threading, time\n"
        "from soflow_platform.cli import main as cli\n"
        f"{before}\n"
        f"cli.app = lambda **_: print('done', end='') or {code}\n"
        "cli.program()\n"
    )
    return subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=120)


def test_a_process_ends_with_its_output_written_and_what_was_registered_done() -> None:
    done = ended_process("atexit.register(lambda: print(', registered', end=''))", "3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "done, registered", "")


def test_a_process_waits_for_its_threads() -> None:
    done = ended_process(
        "def late():\n    time.sleep(1)\n    print(', late', end='')\nthreading.Thread(target=late).start()",
        "None",
    )
    assert (done.returncode, done.stdout) == (0, "done, late")


def test_a_process_that_is_done_is_not_finalized() -> None:
    """In finalization a thread of compiled code that asks for Python is ended by force, which aborts the process."""
    kept = "class Kept:\n    def __del__(self):\n        print('finalized', flush=True)\nkept = Kept()"
    assert ended_process(kept, "0").stdout == "done"
    plain = subprocess.run([sys.executable, "-c", kept], capture_output=True, text=True)
    assert plain.stdout == "finalized\n"


def test_output_that_nobody_reads_is_an_exit_code() -> None:
    assert ended_process("sys.stdout = open('/dev/full', 'w')", "0").returncode == 120


def test_a_profiler_has_its_say_at_the_end() -> None:
    command = [sys.executable, "-m", "cProfile", "-m", "soflow_platform.cli.main", "version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout.startswith("soflow ")
    assert "function calls" in done.stdout
