"""Weights files of small networks with varied samples, for tests that generate."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from soflow_core.networks import DiT, DiTConfig
from soflow_core.objectives import FlowMatching, SoFlow
from soflow_core.objectives.base import Objective
from soflow_core.weights import save_weights
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.generation.parts import PartMaker
from soflow_platform.jobs.generate import Generated, generate
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def save_generator(
    path: Path, info: DatasetInfo, objective: Objective | None = None, conditional: bool = True
) -> Path:
    """Weights of a network for such data, perturbed so that samples depend on noise and label."""
    torch.manual_seed(0)
    classes = info.classes if conditional else None
    config = DiTConfig(*info.shape, 2, 16, 1, 2, classes=classes, null_label=conditional)
    network = DiT(config)
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    save_weights(path, network.state_dict(), config, objective or SoFlow(), asdict(info))
    return path


def save_digits_generator(path: Path, heavy: bool = False, conditional: bool = True) -> Path:
    """As `save_generator`, of 8 x 8 images in ten classes; a heavy one takes many steps of flow matching gladly."""
    info = DatasetInfo(kind="pixels", shape=(1, 8, 8), dtype="uint8", classes=10, class_names=NAMES)
    return save_generator(path, info, FlowMatching() if heavy else None, conditional)


def make_set(model: Path, out: str | Path, **settings: Any) -> Generated:
    """`soflowctl generate`, in this process unless `settings` say otherwise."""
    project = ProjectFolder(model.parent / "runs")
    request = GenerateRequest(str(model), str(out), **{"num": 100, "workers": 1, **settings})
    return generate(request, project, TrackingStore(project.tracking_uri))


def interrupt_set(
    monkeypatch: pytest.MonkeyPatch, part: int, model: Path, out: str | Path, **settings: Any
) -> None:
    """`make_set`, ended by KeyboardInterrupt when its `part`-th part begins, counted from 1."""
    make, begun = PartMaker.make, []

    def interrupted(maker: PartMaker, task: Any) -> int:
        begun.append(task.number)
        if len(begun) == part:
            raise KeyboardInterrupt
        return make(maker, task)

    with monkeypatch.context() as patched:
        patched.setattr(PartMaker, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_set(model, out, **settings)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a set, without what names the model."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "generation.json")
    ]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
