"""Every name of one checkpoint makes the same images, which can be scored and trained on as they are."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soflow_core.failures import InputError
from soflow_pipelines.preparation.build import prepare_locally
from soflow_pipelines.shards.reader import SampleReader
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.files import sha256
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.generation.generator import Generator
from soflow_platform.jobs.generate import Generated, generate
from soflow_platform.jobs.prepare import PrepareRequest, make_plan
from soflow_platform.jobs.requests import GenerateRequest
from soflow_platform.registry.versions import register
from soflow_platform.storage.checkpoints import EMA, CheckpointStore
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import Tracking, TrackingStore
from soflow_platform.tuning.record import BestTrial, load_record
from tests.support.scored_sweep import SWEEP, scores_of

TRIAL = "trial-00-soflow"


def checkpoint(project: ProjectFolder, step: int = 6) -> Path:
    return project.trial(SWEEP, TRIAL) / "checkpoints" / f"step-{step:08d}"


def make(project: ProjectFolder, model: str | Path, out: Path, **settings: Any) -> Generated:
    request = GenerateRequest(str(model), str(out), **{"num": 5, **settings})
    return generate(request, project, TrackingStore(project.tracking_uri))


def digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


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
    assert sorted(digests(tmp_path / "out")) == [*names, "generation.json", "grid.png", "manifest.parquet"]
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
    assert recorded["model"] == f"models:/digits/{version}"
    assert recorded["weights"] == sha256(checkpoint(scored) / EMA)


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


def test_what_was_generated_is_scored_as_it_is(scored_once: ProjectFolder, tmp_path: Path) -> None:
    """Labels and class names come with it, and a set is scored as the network that made it."""
    project = ProjectFolder(tmp_path / "runs")
    shutil.copytree(scored_once.root, project.root)
    settings = {"features": "digits-classifier", "metrics": ("fd", "label_agreement"), "reference": "digits"}
    model = str(checkpoint(project))
    (of_network,) = scores_of(project, model, num=70, labels="balanced", **settings)
    for kind in ("png", "webdataset", "parquet", "npz"):
        make(project, model, tmp_path / kind, num=70, format=kind)
        place = tmp_path / kind / "samples.npz" if kind == "npz" else tmp_path / kind
        (score,) = scores_of(project, str(place), num=None, **settings)
        assert score.values["label_agreement"] == of_network.values["label_agreement"], kind
        # A network's own samples are not rounded to 8 bits.
        assert score.values["fd"] == pytest.approx(of_network.values["fd"], rel=0.02), kind


def test_what_was_generated_becomes_training_data(scored_once: ProjectFolder, tmp_path: Path) -> None:
    pixels = {}
    for kind in ("png", "webdataset", "parquet"):
        make(scored_once, checkpoint(scored_once), tmp_path / kind, num=70, format=kind)
        out = tmp_path / f"{kind}-shards"
        plan = make_plan(PrepareRequest(str(tmp_path / kind), str(out)))
        info = prepare_locally(plan, open_storage(out), None)
        assert (info.samples, info.classes, info.shape) == (70, 10, (1, 8, 8))
        assert info.class_names == tuple(str(label) for label in range(10))
        pixels[kind] = sorted(sample.tobytes() for sample in SampleReader(out, info).read(np.arange(70))[0])
    images = Generator.open(checkpoint(scored_once) / EMA).images(
        range(70), [i % 10 for i in range(70)], 0, 1
    )
    expected = sorted(image.numpy().tobytes() for batch in images for image in batch)
    assert pixels["png"] == pixels["webdataset"] == pixels["parquet"] == expected


def test_sets_that_hold_no_images_say_where_they_are(scored_once: ProjectFolder, tmp_path: Path) -> None:
    for kind, said in (("npz", r"name that file"), ("latents", r"holds latents and no images")):
        make(scored_once, checkpoint(scored_once), tmp_path / kind, format=kind)
        with pytest.raises(InputError, match=said):
            open_source(str(tmp_path / kind))
    make(scored_once, checkpoint(scored_once), tmp_path / "png")
    (tmp_path / "png" / "manifest.parquet").unlink()
    with pytest.raises(InputError, match="is not finished: run its `soflowctl generate` again"):
        open_source(str(tmp_path / "png"))


def test_sampler_settings_decide_the_images(scored_once: ProjectFolder, tmp_path: Path) -> None:
    flow = scored_once.trial(SWEEP, "trial-01-flow_matching") / "checkpoints" / "step-00000006"
    make(scored_once, flow, tmp_path / "euler", steps=2)
    make(scored_once, flow, tmp_path / "heun", steps=2, sampling={"sampler": "heun"})
    assert digests(tmp_path / "euler") != digests(tmp_path / "heun")
    for name, times in {"even": [0.5], "late": [0.25]}.items():
        make(
            scored_once, checkpoint(scored_once), tmp_path / name, steps=2, sampling={"sampling_times": times}
        )
    make(scored_once, checkpoint(scored_once), tmp_path / "usual", steps=2)
    images = {name: digests(tmp_path / name)["000000-label-0.png"] for name in ("usual", "even", "late")}
    assert images["usual"] == images["even"] != images["late"]
    with pytest.raises(InputError, match="sampling"):
        make(scored_once, checkpoint(scored_once), tmp_path / "late", steps=2)
    with pytest.raises(InputError, match="sampler is 'heun'; it is one of 'consistency', 'ode'"):
        make(scored_once, checkpoint(scored_once), tmp_path / "other", sampling={"sampler": "heun"})
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_one_and_four_workers_make_the_bytes_of_one_process(
    scored_once: ProjectFolder, tmp_path: Path
) -> None:
    model = checkpoint(scored_once)
    for name, settings in (
        ("here", {"workers": 1}),
        ("two", {"workers": 2, "batch": 7}),
        ("four", {"workers": 4}),
    ):
        done = make(scored_once, model, tmp_path / name, num=700, format="webdataset", **settings)
        assert done.made == 700
    assert digests(tmp_path / "here") == digests(tmp_path / "two") == digests(tmp_path / "four")


def test_steps_are_those_of_the_sweep_where_the_command_names_none(
    scored: ProjectFolder, tmp_path: Path
) -> None:
    record = load_record(scored, SWEEP)
    assert record is not None
    record.experiment["sampling"] = {"steps": 2}
    record.save(scored)
    names = {
        "trial": f"{SWEEP}/{TRIAL}",
        "checkpoint": checkpoint(scored),
        "version": f"models:/digits/{register_newest(scored)}",
    }
    make(scored, checkpoint(scored) / EMA, tmp_path / "two", steps=2)
    expected = digests(tmp_path / "two")
    for kind, name in names.items():
        done = make(scored, name, tmp_path / kind)
        assert done.steps == 2
        assert digests(tmp_path / kind).items() - expected.items() == {
            ("generation.json", digests(tmp_path / kind)["generation.json"])
        }
    assert make(scored, names["trial"], tmp_path / "one", steps=1).steps == 1
    (score,) = scores_of(scored, f"{SWEEP}/{TRIAL}", features="pooled", metrics=("fd",))
    assert score.tags["steps"] == "2"
