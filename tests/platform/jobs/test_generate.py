"""A folder of images is a function of its settings, is completed after an interruption, and holds images of one setting alone."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soflow_core.failures import InputError
from soflow_platform.generation.generator import Generator
from soflow_platform.jobs import generate as job
from soflow_platform.jobs.generate import GeneratedFolder, choose_labels, generate, image_paths
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.registry.versions import register
from soflow_platform.storage.checkpoints import EMA, CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import BestTrial, load_record
from tests.support.scored_sweep import SWEEP

TRIAL = "trial-00-soflow"


def checkpoint(project: ProjectFolder, step: int = 6) -> Path:
    return project.trial(SWEEP, TRIAL) / "checkpoints" / f"step-{step:08d}"


def make(project: ProjectFolder, model: str | Path, out: Path, **settings: Any) -> GeneratedFolder:
    request = GenerateRequest(str(model), out, **{"num": 5, **settings})
    return generate(request, project, TrackingStore(project.tracking_uri))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def register_newest(project: ProjectFolder) -> str:
    """Register the trial's newest checkpoint as `digits`. Returns its version."""
    record = load_record(project, SWEEP)
    assert record is not None
    tracking = Tracking(TrackingStore(project.tracking_uri), record.experiment_id or "")
    record.best = BestTrial(TRIAL, 6, {"eval/fd_nfe1": 1.0})
    newest = CheckpointStore(project.trial(SWEEP, TRIAL) / "checkpoints").published()[-1]
    return register(tracking, record.candidate("digits"), newest)


def test_each_image_is_that_of_its_seed_number_and_label(scored_once: ProjectFolder, tmp_path: Path) -> None:
    done = make(scored_once, checkpoint(scored_once), tmp_path / "out", seed=3, steps=2, num=12)
    assert (done.made, done.kept) == (12, 0)
    names = [f"{i:06d}-label-{i % 10}.png" for i in range(12)]
    assert sorted(digests(tmp_path / "out")) == [*names, "generation.json", "grid.png"]
    images = Generator.open(checkpoint(scored_once) / EMA).png([i % 10 for i in range(12)], seed=3, steps=2)
    for name, image in zip(names, images, strict=True):
        expected = np.asarray(Image.open(io.BytesIO(image)))
        assert (np.asarray(Image.open(tmp_path / "out" / name)) == expected).all()


def test_every_name_of_one_checkpoint_gives_the_same_images(scored: ProjectFolder, tmp_path: Path) -> None:
    version = register_newest(scored)
    for step in (2, 4):
        (checkpoint(scored, step) / "checkpoint.json").unlink()
    record = load_record(scored, SWEEP)
    assert record is not None
    run = Tracking(TrackingStore(scored.tracking_uri), record.experiment_id or "").find(SWEEP, TRIAL)
    assert run is not None
    names = {
        "file": str(checkpoint(scored) / EMA),
        "checkpoint": str(checkpoint(scored)),
        "uri": f"file://{checkpoint(scored)}",
        "sweep": SWEEP,
        "trial": f"{SWEEP}/{TRIAL}",
        "run": run.info.run_id,
        "version": f"models:/digits/{version}",
        "alias": "models:/digits@candidate",
    }
    made = {}
    for kind, name in names.items():
        make(scored, name, tmp_path / kind)
        made[kind] = digests(tmp_path / kind)
        del made[kind]["generation.json"]
    assert all(images == made["file"] for images in made.values())
    recorded = json.loads((tmp_path / "alias" / "generation.json").read_text())
    assert recorded == {"weights": f"models:/digits/{version}", "steps": 1, "seed": 0, "label": None}


def test_an_interrupted_folder_is_completed_with_the_same_bytes(
    scored_once: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = checkpoint(scored_once), tmp_path / "out"
    make(scored_once, model, tmp_path / "whole")
    encode, encoded = job.encode_png, []

    def interrupted(image: Any) -> bytes:
        encoded.append(image)
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return encode(image)

    with monkeypatch.context() as patched:
        patched.setattr(job, "encode_png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(scored_once, model, out)
    assert len(digests(out)) == 3 + 1
    done = make(scored_once, model, out)
    assert (done.made, done.kept) == (2, 3)
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("changed", [{"seed": 1}, {"steps": 2}, {"label": 3}])
def test_a_folder_of_other_settings_is_refused_and_left_alone(
    scored_once: ProjectFolder, tmp_path: Path, changed: dict[str, int]
) -> None:
    make(scored_once, checkpoint(scored_once), tmp_path / "out")
    before = digests(tmp_path / "out")
    (setting,) = changed
    with pytest.raises(InputError, match=rf"made with other settings \({setting}\): choose another --out"):
        make(scored_once, checkpoint(scored_once), tmp_path / "out", **changed)
    assert digests(tmp_path / "out") == before


def test_damaged_weights_make_no_images(scored: ProjectFolder, tmp_path: Path) -> None:
    weights = checkpoint(scored) / EMA
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"ema.safetensors is damaged: its checksum differs"):
        make(scored, checkpoint(scored), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_registered_model_leaves_no_download_behind(
    scored: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_newest(scored)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = sorted(scored.root.rglob("*.safetensors"))
    make(scored, "models:/digits@candidate", tmp_path / "out")
    assert list((tmp_path / "temporary").iterdir()) == []
    assert sorted(scored.root.rglob("*.safetensors")) == before


def test_labels_and_names_follow_the_classes() -> None:
    assert choose_labels(3, None, 5) == [0, 1, 2, 0, 1]
    assert choose_labels(3, 2, 2) == [2, 2]
    assert choose_labels(None, None, 2) is None
    with pytest.raises(InputError, match="this network is unconditional: leave --label out"):
        choose_labels(None, 1, 2)
    assert [path.name for path in image_paths(Path("out"), 2, [7, 8])] == [
        "000000-label-7.png",
        "000001-label-8.png",
    ]
    assert [path.name for path in image_paths(Path("out"), 2, None)] == ["000000.png", "000001.png"]
