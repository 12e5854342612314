"""The paper's recipe for XL/2 runs unchanged on two cores with nothing but `--set`: from real images to decoded samples."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from soflow_core.weights import load_weights
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.tuning.record import all_records
from tests.support.commands import ROOT, Run
from tests.support.in_process import run_here
from tests.support.random_weights import save_inception

SMALL = {
    "network.size": "S/4",
    "data.classes": "10",
    "data.autoencoder": "test",
    "training.steps": "20",
    "training.batch": "4",
    "training.log_every": "10",
    "evaluation.every": "20",
    "evaluation.samples": "16",
    "evaluation.grid": "2",
    "resources.workers": "1",
    "resources.cpus_per_worker": "1",
    "resources.gpus_per_worker": "0",
    "evaluation.features": "pooled",
    "evaluation.final_samples": "null",
    "search": "{metric: eval/fd_nfe1}",
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty-four latents of the real recipe's shape: posterior mean and std (8, 32, 32), ten classes."""
    folder = tmp_path_factory.mktemp("latents") / "shards"
    generator = np.random.default_rng(0)
    info = DatasetInfo(
        kind="latents", shape=(4, 32, 32), dtype="float16", classes=10, autoencoder="test", scaling=0.18215
    )

    def draw(number: int) -> Sample:
        label = number % 10
        mean = generator.standard_normal((4, 32, 32)) * 4 + label - 5
        std = np.full((4, 32, 32), 0.1)
        return Sample(f"{number:08d}", np.concatenate([mean, std]).astype(np.float16), label)

    write_shards((draw(n) for n in range(64)), folder, info, total=64)
    return folder


def overrides(latents: Path, **changes: str) -> list[str]:
    return set_options({**SMALL, "data.source": str(latents), **changes})


def set_options(settings: dict[str, str]) -> list[str]:
    return [argument for key, value in settings.items() for argument in ("--set", f"{key}={value}")]


@pytest.mark.slow
def test_twenty_steps_of_the_recipe_on_latents_reach_the_registry(
    soflowctl: Run, latents: Path, tmp_path: Path
) -> None:
    storage = ProjectFolder(tmp_path / "runs")
    done = soflowctl("run", "sweeps/xl2.yaml", "--storage", str(storage.root), *overrides(latents))
    assert done.returncode == 0, done.stderr
    (record,) = all_records(storage)
    assert record.best is not None
    assert record.best.step == 20
    assert np.isfinite(record.best.metrics["eval/fd_nfe1"])
    client = TrackingStore(storage.tracking_uri).client
    assert client.get_model_version_by_alias("xl2", "candidate").tags["eval.features"] == "pooled-4x8x8-1"
    weights = load_weights(Path(record.best.checkpoint or "") / "ema.safetensors")
    config = weights.network_config
    assert (config.hidden, config.depth, config.heads, config.patch) == (384, 12, 6, 4)
    assert (config.channels, config.height, config.width, config.classes) == (4, 32, 32, 10)
    assert weights.data["scaling"] == 0.18215
    # The latents are of an autoencoder that does not exist: said once, kept as a tag, and nothing else is shown for an image.
    assert done.stdout.count("no sample grids: the autoencoder test") == 1
    for run in client.search_runs([str(record.experiment_id)]):
        assert "no sample grids: the autoencoder test" in run.data.tags["eval.flags"]
        assert client.list_artifacts(run.info.run_id, "images") == []
    assert list(storage.root.rglob("samples/*.png")) == []


SHARED = Path(os.environ.get("SOFLOW_TEST_DATA") or ROOT.parent / "shared")
IMAGES, AUTOENCODER = SHARED / "data" / "imagenet-sample.zip", SHARED / "models" / "kl-f8-mini"
MINIATURE = {
    "network.size": "S/4",
    "data.autoencoder": "null",
    "data.scaling": "null",
    "training.steps": "12",
    "training.batch": "4",
    "training.log_every": "4",
    "evaluation.every": "6",
    "evaluation.samples": "16",
    "evaluation.batch": "8",
    "evaluation.final_samples": "24",
    "evaluation.grid": "2",
    "evaluation.autoencoder": str(AUTOENCODER),
    "search.trials": "1",
    "search.asha": "!drop",
    "resources": "{workers: 1, cpus_per_worker: 1}",
}
"""The shipped sweep with nothing changed but its size: method, search space, scores and registration are its own."""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    not IMAGES.is_file() or not AUTOENCODER.is_dir(),
    reason=f"the sample images and the autoencoder are not in {SHARED} (set SOFLOW_TEST_DATA)",
)
def test_real_images_become_latents_a_sweep_fid_of_decoded_samples_and_decoded_images(
    soflowctl: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFLOW_INCEPTION_WEIGHTS", str(save_inception(tmp_path / "inception.pth")))
    latents, storage = tmp_path / "latents", ProjectFolder(tmp_path / "runs")

    def succeeds(*arguments: str) -> str:
        done = soflowctl(*arguments, timeout=1500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with_autoencoder = ("--autoencoder", str(AUTOENCODER))
    succeeds("data", "prepare", str(IMAGES), *with_autoencoder, "--resolution", "256", "--out", str(latents))
    settings = set_options({**MINIATURE, "data.source": str(latents)})
    printed = succeeds("run", "xl2", "--storage", str(storage.root), *settings)
    assert "2 trial(s), " in printed

    (record,) = all_records(storage)
    best = record.best
    assert best is not None
    assert best.metrics.keys() == {f"eval/{name}_nfe{nfe}" for name in ("fid", "fd") for nfe in (1, 2)}
    assert all(np.isfinite(value) for value in best.metrics.values())
    # The grid is of images, decoded: 2 x 2 of 256 x 256.
    assert min(Image.open(best.grids[0]).size) > 2 * 256

    client = TrackingStore(storage.tracking_uri).client
    version = client.get_model_version_by_alias("xl2", "candidate")
    assert "inception" in version.tags["eval.features"]
    runs = client.search_runs([str(record.experiment_id)], f"tags.`mlflow.parentRunId` = '{record.run}'")
    names = sorted(run.info.run_name for run in runs)
    assert (names[0], names[1][-3:]) == ("paper #00", "#01")
    # The best trial alone is scored with more samples, from other noise.
    finals = [run for run in runs if "evaluate/fid24_nfe1_uniform" in run.data.metrics]
    assert [run.data.tags["soflow.trial"] for run in finals] == [best.trial]
    view = json.loads(
        client.get_experiment(str(record.experiment_id)).tags[f"mlflow.sharedViewState.{record.run}"]
    )
    assert "params.`objective.guidance.mix`" in view["selectedColumns"]

    images = tmp_path / "images"
    name = ("--model", "models:/xl2@candidate", "--num", "3", "--out", str(images))
    succeeds("generate", *name, *with_autoencoder, "--storage", str(storage.root))
    assert [Image.open(path).size for path in sorted(images.glob("0*.png"))] == [(256, 256)] * 3


def test_latents_of_other_classes_are_refused_with_both_numbers(latents: Path, tmp_path: Path) -> None:
    arguments = overrides(latents, **{"data.classes": "1000"})
    done = run_here("run", "xl2", "--storage", str(tmp_path / "runs"), *arguments)
    assert done.returncode == 2
    assert "holds 10 classes, the network is conditioned on 1000 classes" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.autoencoder", "other", "holds latents of test, the configuration names the autoencoder other"),
        ("data.scaling", "0.13025", "is scaled by 0.18215, the configuration says a scaling of 0.13025"),
    ],
)
def test_latents_of_another_autoencoder_or_scaling_are_refused(
    latents: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    arguments = overrides(latents, **{key: value})
    done = run_here("run", "xl2", "--storage", str(tmp_path / "runs"), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "runs").exists()


def test_more_than_the_machine_has_is_refused_with_both_numbers(
    soflowctl: Run, latents: Path, tmp_path: Path
) -> None:
    arguments = overrides(latents, **{"resources.cpus_per_worker": "512"})
    done = soflowctl("run", "xl2", "--storage", str(tmp_path / "runs"), *arguments)
    assert done.returncode == 2
    assert "one trial asks for 512 CPU and 0 GPU (1 workers) and this Ray has" in done.stderr
