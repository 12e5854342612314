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
