"""A finished sweep of two methods, trained for a few steps in this process: something to score."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from soflow_pipelines.features import digits_classifier
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_platform.config.document import apply_override, read_document
from soflow_platform.config.validation import validate
from soflow_platform.evaluation.runner import LocalStatisticsRunner
from soflow_platform.jobs.evaluate import Score, Services, evaluate
from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest, SamplingRequest
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.training.dataset import open_data
from soflow_platform.tuning.record import BestTrial, SweepRecord, TrialEntry
from soflow_platform.tuning.search_space import trials
from tests.support.made_once import made_once
from tests.support.trained_trials import trainer_of

ROOT = Path(__file__).parents[2]
SWEEP = "digits-00000000"
SETTINGS = (
    "network={patch: 4, hidden: 16, depth: 1, heads: 2}",
    "training={steps: 6, batch: 8, ema: [0.5], log_every: 1, keep_checkpoints: 10}",
    "search.space={objective: [{method: soflow}, {method: flow_matching}]}",
    "evaluation={every: 2, samples: 100, nfe: [1, 2], features: digits-classifier, grid: 2}",
    "comparison=[{steps: [1, 2]}, {methods: [flow_matching], steps: [2], sampling_scale: 2.0, samples: 80}]",
)


def empty_store(factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables: making them takes seconds, copying the file does not."""

    def make(folder: Path) -> None:
        folder.mkdir()
        TrackingStore(f"sqlite:///{folder / 'mlflow.db'}").prepare()

    return made_once(factory, "empty-store", make) / "mlflow.db"


def digits_files(factory: pytest.TempPathFactory) -> Path:
    """What a project folder has after the first training on the digits: their shards, and the classifier of them."""

    def make(folder: Path) -> None:
        project = ProjectFolder(folder)
        ensure_builtin("digits", project.data / "digits")
        digits_classifier(project.features)

    return made_once(factory, "digits-files", make)


def scored_files(factory: pytest.TempPathFactory) -> Path:
    """The project folder of `trained_sweep`. All processes read it; a test takes a copy."""
    store, files = empty_store(factory), digits_files(factory)
    return made_once(factory, "scored", lambda folder: trained_sweep(folder, store, files))


def trained_sweep(root: Path, store: Path, files: Path) -> ProjectFolder:
    """A project folder with the sweep's record, its checkpoints and its runs in MLflow."""
    storage = ProjectFolder(root)
    shutil.copytree(files, root)
    shutil.copy(store, root)
    document = read_document(ROOT / "sweeps" / "digits.yaml")
    for override in SETTINGS:
        apply_override(document, override)
    experiment = validate(document)
    _, info = open_data(experiment, storage)
    tracking = Tracking.open(storage.tracking_uri, "digits", storage)
    facts = {"data.source": "digits", "data.digest": info.digest}
    parent = tracking.open_run(SWEEP, SWEEP, params={}, tags=facts)
    points = trials(document, experiment)
    for point in points:
        trainer_of(storage, tracking, point.experiment, SWEEP, point.name, tags=facts, parent=parent).run()
    SweepRecord(
        id=SWEEP,
        name="digits",
        file="digits.yaml",
        experiment=experiment.resolved(),
        trials=[TrialEntry(p.name, p.settings, p.experiment.training.steps) for p in points],
        metric=experiment.search.metric,
        mode=experiment.mode,
        run=parent,
        experiment_id=tracking.experiment_id,
        tracking_uri=tracking.store.uri,
        finished=True,
        best=BestTrial(points[0].name, 6, {}),
    ).save(storage)
    return storage


def local_services(project: ProjectFolder) -> Services:
    """Scoring in this process, logged to the project folder's own store."""
    return Services(project, TrackingStore(project.tracking_uri), LocalStatisticsRunner(project))


def scores_of(project: ProjectFolder, target: str, num: int | None = 100, **settings: Any) -> list[Score]:
    """Scores of a target, computed in this process; `settings` are fields of SamplingRequest and of ProtocolRequest."""
    sampling = {
        each.name: settings.pop(each.name) for each in fields(SamplingRequest) if each.name in settings
    }
    request = EvaluateRequest(target, num, SamplingRequest(**sampling), ProtocolRequest(**settings))
    return evaluate(request, local_services(project))[1]


def artifacts_of(project: ProjectFolder, version: str) -> Path:
    """The folder with the files of a registered version of the model digits; it may be that of another copy of the project."""
    client = TrackingStore(project.tracking_uri).client
    source = client.get_model_version("digits", version).source
    location = client.get_logged_model(source.removeprefix("models:/")).artifact_location
    return Path(location.removeprefix("file://")) / "artifacts"
