"""docs/extending.md is true: its files are plugins that a sweep file names, keep their contracts, train and are compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from soflow_pipelines.metrics import METRICS
from soflow_pipelines.preparation.builtin import Expected
from soflow_pipelines.sources.digits import load_digits
from soflow_platform.config.validation import read_experiment
from soflow_platform.training.model import describe_network
from soflow_platform.training.step_check import check_first_steps
from soflow_platform.tuning.search_space import trials
from tests.support.commands import environment
from tests.support.documents import ROOT, Command, blocks_of_page
from tests.support.plugin_files import restored_registries

PAGE, METHOD_PAGE = ROOT / "docs" / "extending.md", ROOT / "docs" / "new-method.md"
SMALL = [
    *("--set", "training.steps=20", "--set", "evaluation.every=20", "--set", "training.batch=32"),
    *("--set", "evaluation.samples=64", "--set", "evaluation.grid=4", "--set", "comparison=[{steps: [2]}]"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, outside the repository: the files of both pages."""
    folder = tmp_path_factory.mktemp("mine")
    for block in [*blocks_of_page(METHOD_PAGE), *blocks_of_page(PAGE)]:
        if block.mark == "file" and (block.page == PAGE or block.value.startswith("soflow_core/")):
            (folder / Path(block.value).name).write_text(block.text, encoding="utf-8")
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    with restored_registries():
        yield folder


def test_the_sweep_of_the_page_names_its_plugins_and_takes_a_step(inside: Path) -> None:
    experiment, document = read_experiment(inside / "mine.yaml")
    assert [plugin.module for plugin in experiment.plugins] == [
        *(
            "secant",
            "small_unet",
            "midpoint",
            "bent_path",
            "leaning",
            "mode_times",
            "schedules",
            "kid_all",
            "coverage",
        )
    ]
    assert experiment.search.metric in experiment.evaluation.reported(True)
    planned = trials(document, experiment)
    data = Expected((1, 8, 8), 10)
    assert {describe_network(trial.experiment, data).title for trial in planned} == {"UNet-16x1"}
    assert [trial.experiment.objective.method for trial in planned] == ["secant", "flow_matching", "soflow"]
    check_first_steps([(trial.name, trial.experiment) for trial in planned], data)
    assert METRICS["coverage"].better == "max"
    assert experiment.search.metric == "eval/kid_all_nfe2"


def test_the_table_of_the_page_counts_the_lines_of_its_files(folder: Path) -> None:
    rows = re.findall(
        r"^\| [^|]+ \| \[?`(\w+\.py)`.*? \| (\d+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    files = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in folder.glob("*.py")}
    assert {name: int(lines) for name, lines in rows} == files


def run(folder: Path, arguments: list[str], **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={
            **environment(),
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "pipelines", ROOT / "platform"))),
            **variables,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def commands(program: str) -> list[Command]:
    blocks = [block for block in blocks_of_page(PAGE) if block.language == "sh"]
    return [c for block in blocks for c in block.commands if c.arguments[0] == program]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_files_of_the_page_keep_their_contracts(folder: Path) -> None:
    suites = commands("python")
    assert len(suites) == 2
    for shown in suites:
        printed = run(folder, [*shown.arguments[2:], "-m", "not slow", "-p", "no:cacheprovider"])
        assert "failed" not in printed
        assert "passed" in printed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_page_prepare_train_and_compare(folder: Path) -> None:
    digits = load_digits()
    np.save(folder / "train.npy", digits.images[:200].transpose(0, 2, 3, 1))
    np.save(folder / "train.labels.npy", digits.labels[:200])
    np.save(folder / "colour.npy", np.repeat(digits.images[:40].transpose(0, 2, 3, 1), 3, axis=3))
    np.save(folder / "colour.labels.npy", digits.labels[:40])
    printed: dict[str, str] = {}
    for shown in commands("soflowctl"):
        variables = dict(word.split("=", 1) for word in shown.words[: -len(shown.arguments)])
        _, command, *rest = shown.arguments
        small = {"run": SMALL, "compare": ["--no-costs"]}.get(command, [])
        printed[command] = printed.get(command, "") + run(
            folder, ["soflow_platform.cli.main", command, *rest, *small], **variables
        )
    assert "200 samples" in printed["data"]
    assert "40 samples" in printed["data"]
    assert "secant" in printed["run"]
    assert "secant" in printed["compare"]
    assert "coverage" in printed["compare"]
