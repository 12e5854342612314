"""An evaluation that is killed goes on with the same command, and its numbers are those of one that was not."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from soflow_platform.storage.project import ProjectFolder
from tests.support.scored_sweep import SWEEP, digits_files, empty_store, trained_sweep

pytestmark = pytest.mark.faults
SECONDS = 240
# 16 blocks, each a few seconds long.
COMMAND = [
    "evaluate",
    f"{SWEEP}/trial-00",
    "--num",
    "2000",
    "--steps",
    "400",
    "--metrics",
    "fd,kid,label_agreement",
]


def start(storage: ProjectFolder, log: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "soflow_platform.cli.main",
        *COMMAND,
        "--json",
        "--storage",
        str(storage.root),
    ]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=storage.root)


def finished(process: subprocess.Popen[str], log: Path) -> Any:
    printed, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, log.read_text()[-2000:]
    return json.loads(printed)


def blocks(storage: ProjectFolder) -> list[Path]:
    return sorted((storage.root / "evaluations").glob("*/block-*.npz"))


def until_some_blocks(storage: ProjectFolder, process: subprocess.Popen[str], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while len(blocks(storage)) < 3:
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    store, files = empty_store(tmp_path_factory), digits_files(tmp_path_factory)
    return trained_sweep(tmp_path_factory.mktemp("swept") / "runs", store, files)


@pytest.fixture(scope="module")
def uncut(swept: ProjectFolder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The numbers of a command that was left alone."""
    root = tmp_path_factory.mktemp("uncut")
    shutil.copytree(swept.root, root / "runs")
    return numbers(finished(start(ProjectFolder(root / "runs"), root / "log"), root / "log"))


def numbers(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is printed, without where it lies."""
    return [
        {**record, "settings": {k: v for k, v in record["settings"].items() if k != "reference"}}
        for record in records
    ]


def test_a_killed_driver_goes_on_and_gives_the_same_numbers(
    swept: ProjectFolder, uncut: Any, tmp_path: Path
) -> None:
    storage, log = ProjectFolder(tmp_path / "runs"), tmp_path / "log"
    shutil.copytree(swept.root, storage.root)
    cut = start(storage, log)
    until_some_blocks(storage, cut, log)
    everyone = psutil.Process(cut.pid).children(recursive=True)
    cut.send_signal(signal.SIGKILL)
    psutil.wait_procs(everyone, timeout=60)
    cut.communicate()
    made = {path: path.stat().st_mtime_ns for path in blocks(storage)}
    assert 3 <= len(made) < 16
    again = start(storage, log)
    while len(blocks(storage)) == len(made):
        assert again.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert numbers(finished(again, log)) == uncut
    assert blocks(storage) == []


def test_a_killed_worker_costs_its_block_alone(swept: ProjectFolder, uncut: Any, tmp_path: Path) -> None:
    storage, log = ProjectFolder(tmp_path / "runs"), tmp_path / "log"
    shutil.copytree(swept.root, storage.root)
    driver = start(storage, log)
    # The command begins in its own process; Ray's begin with what is left after some seconds.
    while len(scorers := actors(driver)) < 1:
        assert driver.poll() is None, "the command ended before Ray was needed"
        time.sleep(0.05)
    scorers[0].kill()
    assert numbers(finished(driver, log)) == uncut


def actors(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """The command's processes that score blocks."""
    found = []
    for child in psutil.Process(driver.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "PoolActor" in " ".join(child.cmdline()):
                found.append(child)
    return found
