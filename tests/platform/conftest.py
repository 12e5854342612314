"""A small experiment on the real digits, and a project folder for it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from soflow_platform.config.document import apply_override, read_document
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import validate
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking
from soflow_platform.training.worker import Trainer
from tests.support import scored_sweep
from tests.support.trained_trials import trainer_of

ROOT = Path(__file__).parents[2]

SMALL = (
    "network={patch: 4, hidden: 16, depth: 1, heads: 2}",
    "training={steps: 6, batch: 8, ema: [0.5], log_every: 1, keep_checkpoints: 10}",
    "evaluation={every: 2, samples: 32, nfe: [1, 2], features: pooled, grid: 2}",
    "search.space={}",
)


def small_experiment(*overrides: str) -> Experiment:
    document = read_document(ROOT / "sweeps" / "digits.yaml")
    for override in (*SMALL, *overrides):
        apply_override(document, override)
    return validate(document)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def storage(tmp_path: Path) -> ProjectFolder:
    return ProjectFolder(tmp_path / "runs")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables."""
    return scored_sweep.empty_store(tmp_path_factory)


@pytest.fixture(scope="session")
def digits_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with the digits' shards and the classifier of them. Tests take a copy."""
    return scored_sweep.digits_files(tmp_path_factory)


@pytest.fixture(scope="session")
def scored_once(tmp_path_factory: pytest.TempPathFactory) -> ProjectFolder:
    """A finished sweep of two methods. Tests read it; those that score take a copy."""
    files = scored_sweep.scored_files(tmp_path_factory)
    return ProjectFolder(Path(shutil.copytree(files, tmp_path_factory.mktemp("scored") / "runs")))


@pytest.fixture
def scored(scored_once: ProjectFolder, tmp_path: Path) -> ProjectFolder:
    """A copy of the finished sweep, to score in."""
    shutil.copytree(scored_once.root, tmp_path / "scored")
    return ProjectFolder(tmp_path / "scored")


@pytest.fixture
def tracking(storage: ProjectFolder, empty_store: Path) -> Tracking:
    storage.root.mkdir()
    shutil.copy(empty_store, storage.root)
    return Tracking.open(storage.tracking_uri, "digits", storage)


@pytest.fixture
def worker(storage: ProjectFolder, tracking: Tracking, digits_files: Path) -> Callable[..., Trainer]:
    """Makes one worker of one trial, as Ray Train would, without Ray; the digits are there as after an earlier trial."""
    shutil.copytree(digits_files, storage.root, dirs_exist_ok=True)

    def make(trial: str, *overrides: str) -> Trainer:
        return trainer_of(storage, tracking, small_experiment(*overrides), "sweep", trial)

    return make
