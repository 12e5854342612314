"""Weights that are not finite go nowhere: every way into and out of the registry refuses them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch

from soflow_core.failures import InputError
from soflow_core.networks import DiT
from soflow_core.weights import load_weights, save_weights
from soflow_pipelines.storage.files import sha256
from soflow_platform.errors import UserError
from soflow_platform.jobs.export import FORMATS, ExportFormat, ExportRequest, export
from soflow_platform.jobs.import_weights import ImportRequest, import_weights
from soflow_platform.jobs.promote import promote
from soflow_platform.jobs.requests import PromoteRequest
from soflow_platform.registry.versions import PYFUNC_FILE
from soflow_platform.storage.checkpoints import EMA, RECORD, CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from tests.support.generators import save_digits_generator
from tests.support.scored_sweep import SWEEP, artifacts_of, local_services, scores_of

TRIAL = "trial-00-soflow"


def poison(path: Path) -> Path:
    """Makes one weight of a file NaN."""
    weights = load_weights(path)
    assert weights.objective is not None
    weights.tensors["final_layer.linear.bias"][0] = float("nan")
    save_weights(path, weights.tensors, weights.network_config, weights.objective, weights.data)
    return path


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    return poison(save_digits_generator(tmp_path / "nan.safetensors"))


@pytest.mark.parametrize("settings", [{}, {"force": "a test"}, {"dry_run": True}])
def test_a_version_does_not_become_champion(scored: ProjectFolder, settings: dict[str, Any]) -> None:
    services = local_services(scored)
    promote(PromoteRequest(f"{SWEEP}/{TRIAL}"), services)
    client = TrackingStore(scored.tracking_uri).client
    client.delete_registered_model_alias("digits", "champion")
    poison(artifacts_of(scored, "1") / EMA)
    with pytest.raises(
        UserError, match=r"version 1 of 'digits' cannot become champion: .* not finite \(final_layer"
    ):
        promote(PromoteRequest("models:/digits/1", **settings), services)
    assert "champion" not in client.get_registered_model("digits").aliases


def test_a_trial_is_not_registered(scored: ProjectFolder) -> None:
    folder = scored.trial(SWEEP, TRIAL) / "checkpoints"
    for checkpoint in CheckpointStore(str(folder)).published():
        place = folder / checkpoint.name
        record = json.loads((place / RECORD).read_text())
        record["files"][EMA] = sha256(poison(place / EMA))
        (place / RECORD).write_text(json.dumps(record))
    with pytest.raises(InputError, match="weights that are not finite"):
        promote(PromoteRequest(f"{SWEEP}/{TRIAL}"), local_services(scored))
    assert TrackingStore(scored.tracking_uri).client.search_registered_models() == []


def test_a_trial_is_not_scored(scored: ProjectFolder, poisoned: Path) -> None:
    with pytest.raises(UserError, match="weights that are not finite"):
        scores_of(scored, str(poisoned))


def test_a_registered_model_is_not_loaded(
    tmp_path: Path, poisoned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    artifacts = {"weights": str(poisoned)}
    mlflow.pyfunc.save_model(
        tmp_path / "model", python_model=str(PYFUNC_FILE), artifacts=artifacts, pip_requirements=[]
    )
    with pytest.raises(UserError, match=r"weights that are not finite \(final_layer"):
        mlflow.pyfunc.load_model(tmp_path / "model")


@pytest.mark.parametrize("format", FORMATS)
def test_no_file_is_exported(tmp_path: Path, poisoned: Path, format: ExportFormat) -> None:
    project, out = ProjectFolder(tmp_path / "runs"), tmp_path / "out"
    with pytest.raises(UserError, match="weights that are not finite"):
        export(ExportRequest(str(poisoned), format, out), project, TrackingStore(project.tracking_uri))
    assert not out.exists()


def test_a_checkpoint_is_not_imported(storage: ProjectFolder, tracking: Tracking, poisoned: Path) -> None:
    sound = save_digits_generator(poisoned.with_name("sound.safetensors"))
    config = replace(load_weights(sound).network_config, heads=2)
    state = DiT(config).state_dict()
    state["blocks.0.attn.qkv.weight"][3, 1] = float("inf")
    path = poisoned.with_name("official.pt")
    torch.save({"ema_model": state, "model": state}, path)
    request = ImportRequest(path, "official", classes=10, heads=2)
    with pytest.raises(UserError, match=r"not finite \(blocks\.0\.attn\.qkv\.weight\)"):
        import_weights(request, storage, tracking.store.uri)
    assert tracking.client.search_registered_models() == []
