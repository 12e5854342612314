"""The folder and processes of a Ray that a command starts: nobody else reads the one or reaches the other, nor do group signals."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from soflow_platform.cluster.session_folder import KEPT_SECONDS, session_root
from soflow_platform.errors import UserError


def old(path: Path) -> None:
    when = time.time() - 2 * KEPT_SECONDS
    os.utime(path, (when, when))


def session(root: Path, process: int, logged_now: bool = False) -> Path:
    folder = root / f"session_2026-01-01_00-00-00_000000_{process}"
    (folder / "logs").mkdir(parents=True)
    log = folder / "logs" / "raylet.out"
    log.write_text("x")
    if not logged_now:
        old(log)
    old(folder)
    return folder


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder with a path that is short enough for sockets, as RAY_TMPDIR."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="s") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def root(short: Path) -> Path:
    assert session_root().is_relative_to(short)
    return session_root()


def test_only_its_user_enters_the_folder(root: Path) -> None:
    assert root.parent.stat().st_mode & 0o777 == 0o700
    root.parent.chmod(0o777)
    assert session_root() == root
    assert root.parent.stat().st_mode & 0o777 == 0o700


def test_old_sessions_of_ended_processes_are_removed(root: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    of_ended, of_running = session(root, ended.pid), session(root, os.getpid())
    still_logging = session(root, ended.pid + 2**22, logged_now=True)
    session_root()
    assert [s.is_dir() for s in (of_ended, of_running, still_logging)] == [False, True, True]


def test_a_folder_of_somebody_else_is_refused(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    someone = short.stat().st_uid + 1
    monkeypatch.setattr(os, "getuid", lambda: someone)
    with pytest.raises(UserError, match="RAY_TMPDIR"):
        session_root()


def test_a_path_too_long_for_sockets_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "long" * 20)
    assert session_root() == Path(f"/tmp/soflow-{os.getuid()}/ray")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "long" * 20)
    with pytest.raises(UserError, match="too long"):
        session_root()


COMMAND = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))
from soflow_platform.cluster.connection import connected
import ray
with connected(None) as cluster:
    print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
    sys.stdin.readline()
    cluster.require_alive()
    print("alive", flush=True)
"""


LOOPBACK = {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process takes connections."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return set()


def test_ray_listens_here_alone_and_no_signal_to_the_group_reaches_it(root: Path) -> None:
    command = [sys.executable, "-c", COMMAND]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        assert folder.is_relative_to(root)
        rays = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in each.name() for each in rays)
        # Neither Ray's page nor its autoscaler nor its log monitor is of use to a command on one machine.
        running = " ".join(word for each in rays for word in each.cmdline())
        assert [name for name in ("dashboard.py", "monitor.py") if name in running] == []
        assert not {address for each in rays for address in listening(each)} - LOOPBACK
        os.killpg(process.pid, signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
        assert psutil.wait_procs(rays, timeout=2)[0] == []
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.readline() == "alive\n"
        assert process.wait(60) == 0
    assert psutil.wait_procs(rays, timeout=30)[1] == []
