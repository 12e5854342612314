"""The core with the lowest PyTorch that is allowed, in an environment made once in build/. The highest is that of constraints.txt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT

PAIRS = {"2.8": ("2.8.0", "0.23.0")}
"""Lowest release of torch in pyproject.toml -> that release, and the torchvision that belongs to it."""
PACKAGES = ("timm", "safetensors", "pyyaml", "scipy", "hypothesis", "pytest", "pytest-timeout")
"""What the core and its tests need beside it."""
INSTALL_SECONDS, TEST_SECONDS = 900, 1200


def bounds() -> tuple[str, str]:
    """Lowest release of torch that is allowed, and the first that is not."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ((lowest, beyond),) = re.findall(r'"torch>=([\d.]+),<([\d.]+)"', text, re.MULTILINE)
    return lowest, beyond


def numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:2])


def test_the_pinned_torch_is_the_newest_that_is_allowed() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = max(map(numbers, re.findall(r"^torch==([\d.]+)", text, re.MULTILINE)))
    assert (pinned[0], pinned[1] + 1) == numbers(bounds()[1])


@pytest.fixture
def lowest() -> Path:
    """Python with the lowest torch. Skips where it cannot be installed."""
    torch, torchvision = PAIRS[bounds()[0]]
    folder = ROOT / "build" / f"torch-{torch}"
    python, installed = folder / "bin" / "python", folder / ".installed"
    if not installed.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [
            str(python),
            "-m",
            "pip",
            "install",
            "-q",
            f"torch=={torch}",
            f"torchvision=={torchvision}",
            *PACKAGES,
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        if done.returncode:
            pytest.skip(f"torch {torch} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        installed.touch()
    return python


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_SECONDS + TEST_SECONDS)
def test_the_core_passes_its_tests_on_the_lowest_torch(lowest: Path) -> None:
    seen = subprocess.run(
        [str(lowest), "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
    )
    assert numbers(seen.stdout.strip()) == numbers(bounds()[0])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "pipelines"))),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        str(lowest),
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow and not faults",
        "tests/core",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TEST_SECONDS
    )
    assert done.returncode == 0, done.stdout[-3000:]
