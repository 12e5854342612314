"""Folders that the first of a run's test processes makes, and all of them read."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, which `make` creates where no process of this run has. A test that writes in it takes a copy."""
    base = factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder of its own in the folder of the run.
    run = base.parent if base.name == f"popen-{os.environ.get('PYTEST_XDIST_WORKER')}" else base
    folder, complete = run / name, run / f"{name}.complete"
    with (run / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            complete.touch()
    return folder
