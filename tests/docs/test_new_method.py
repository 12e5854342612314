"""docs/new-method.md is true: its files, put where it says, pass their tests and train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.workplace import SMALL_NETWORK, SMALL_SAMPLES
from tests.support.commands import environment
from tests.support.documents import ROOT, blocks_of_page

PAGE = ROOT / "docs" / "new-method.md"
SMALL = [
    *SMALL_NETWORK,
    *SMALL_SAMPLES,
    *("--set", "training.steps=20", "--set", "evaluation.every=20", "--set", "training.batch=32"),
    *("--set", "comparison=[{steps: [1]}]"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as the page leaves it: soflow_core, tests and sweeps are copies, the rest is this one's."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(
        ROOT / "soflow_core", folder / "soflow_core", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "sweeps", folder / "sweeps")
    (folder / "tests" / "core").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "__init__.py", folder / "tests")
    (folder / "tests" / "support").symlink_to(ROOT / "tests" / "support")
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "pyproject.toml", folder)
    for block in blocks_of_page(PAGE):
        if block.mark == "file":
            (folder / block.value).write_text(block.text, encoding="utf-8")
    return folder


def run(checkout: Path, arguments: list[str]) -> str:
    paths = [checkout, ROOT / "pipelines", ROOT / "platform"]
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=checkout,
        env={**environment(), "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def commands() -> list[list[str]]:
    shown = [
        command for block in blocks_of_page(PAGE) if block.language == "sh" for command in block.commands
    ]
    return [command.arguments for command in shown]


def test_the_tests_of_the_page_pass(checkout: Path) -> None:
    (shown,) = (arguments for arguments in commands() if arguments[0] == "python")
    assert "3 passed" in run(checkout, shown[2:])


def test_the_sweep_of_the_page_is_a_plan_of_three_trials(checkout: Path) -> None:
    printed = run(checkout, ["soflow_platform.cli.main", "run", "sweeps/secant.yaml", "--dry-run"])
    assert "trial-00-secant" in printed
    assert "3 trials" in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_page_train_and_compare_it(checkout: Path) -> None:
    for _, *arguments in (arguments for arguments in commands() if arguments[0] == "soflowctl"):
        small = ["--no-costs"] if arguments[0] == "compare" else SMALL
        shown = "meanflow" if "trial-02" in arguments else "secant"
        assert shown in run(checkout, ["soflow_platform.cli.main", *arguments, *small])
