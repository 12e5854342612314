"""A checkpoint of other code, registered and scored by one command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from soflow_core.networks import DiT, DiTConfig
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_platform.registry.versions import find_version
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from tests.support.commands import Run

CONFIG = DiTConfig(channels=1, height=8, width=8, patch=4, hidden=16, depth=1, heads=2, classes=10)


@pytest.mark.slow
def test_what_is_imported_is_scored_at_once(soflowctl: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DiT(CONFIG)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = {
        name.replace("s_embedder", "r_embedder"): tensor for name, tensor in network.state_dict().items()
    }
    torch.save({"ema": state, "model": state}, tmp_path / "meanflow.pt")
    data = ensure_builtin("digits", tmp_path / "digits")
    project = ProjectFolder(tmp_path / "runs")
    words = [
        *("import", str(tmp_path / "meanflow.pt"), "--name", "published", "--heads", "2"),
        *("--storage", str(project.root), "--score", "--num", "64"),
    ]
    refused = soflowctl(*words, "--classes", "10")
    assert refused.returncode == 2
    assert "--score needs --data" in refused.stderr
    done = soflowctl(*words, "--data", str(data))
    assert done.returncode == 0, done.stderr
    assert "models:/published/1 is registered, with alias candidate" in done.stdout
    assert "logged to models:/published/1: evaluate/" in done.stdout
    version = find_version(TrackingStore(project.tracking_uri), "published/1")
    assert version.tags["soflow.method"] == "meanflow"
    assert [name for name in version.tags if name.startswith("evaluate/")]
