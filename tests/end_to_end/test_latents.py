"""ImageNet's images to latents to shards to a trained network to images again."""

from __future__ import annotations

import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import SoFlow
from soflow_core.objectives.base import Batch
from soflow_core.optimizer import OptimizerConfig
from soflow_core.samplers.noise import sample_noise
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.images.encode import encode_png, image_grid
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.preview import sample_images
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.jobs.prepare import PrepareRequest, prepare
from tests.support.commands import command, environment

ROOT = Path(__file__).parents[2]
SHARED = Path(os.environ.get("SOFLOW_TEST_DATA") or ROOT.parent / "shared")
IMAGES = SHARED / "data" / "imagenet-sample.zip"
AUTOENCODER = SHARED / "models" / "kl-f8-mini"
STEPS = 50
BATCH = 8

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not IMAGES.is_file() or not AUTOENCODER.is_dir(),
        reason=f"the sample images and the autoencoder are not in {SHARED} (set SOFLOW_TEST_DATA)",
    ),
]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("latents") / "set"
    request = PrepareRequest(source=str(IMAGES), out=str(out), autoencoder=str(AUTOENCODER), resolution=256)
    done = prepare(request)
    assert done.info.samples == 200
    return out


def test_the_latents_are_those_of_the_images(latents: Path) -> None:
    assert verify(latents) == []
    autoencoder = load_autoencoder(str(AUTOENCODER))
    decoded, labels = sample_images(latents, 16, decoder=autoencoder)
    source = open_source(str(IMAGES))
    assert source.labels is not None
    assert labels is not None
    plan = ShardPlan(source, PrepareSettings(256), autoencoder.facts)
    of_label = {
        int(source.labels[plan.place(number)[0]]): plan.pixels(number) for number in range(plan.samples)
    }
    errors = [
        np.square(image.astype(float) - of_label[int(label)]).mean()
        for image, label in zip(decoded, labels, strict=True)
    ]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 22


@pytest.mark.timeout(900)
def test_a_network_learns_from_latents_and_its_samples_are_decoded(latents: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    objective = SoFlow()
    with ShardLoader(latents, BATCH, seed=0) as loader:
        channels, height, width = loader.info.shape
        loader.info.check_fits((4, 32, 32), classes=1000, autoencoder="kl-f8-mini", scaling=0.77679)
        network = DiT(
            dit_config("S/4", channels, height, width, classes=1000, null_label=objective.needs_null_label)
        )
        train = TrainStep(
            network, objective, TrainStepConfig(STEPS, OptimizerConfig(lr=3e-4), ema_decays=(0.9,))
        )
        generator = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(STEPS):
            batch = next(loader)
            draws = objective.draw(generator, BATCH, loader.info.shape, conditional=True)
            record = train(Batch(batch.x0, batch.labels), draws)
            assert record.finite
            losses.append(float(record.terms["velocity_mse"]))
    assert train.step == STEPS
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    network.load_state_dict(train.ema_state())
    network.eval()
    noise = sample_noise(0, range(4), (channels, height, width))
    with torch.no_grad():
        samples = objective.sample(network, noise, torch.tensor([2, 8, 10, 16]), 1, [])
    images = to_uint8(load_autoencoder(str(AUTOENCODER)).decode(samples))
    assert images.shape == (4, 3, 256, 256)
    assert images.float().std() > 5
    write_bytes(tmp_path / "grid.png", encode_png(image_grid(images, columns=2)))
    assert Image.open(tmp_path / "grid.png").size == (2 * 258 + 2, 2 * 258 + 2)


@pytest.mark.timeout(900)
def test_methods_with_settings_of_their_own_are_compared_on_latents_of_cifar10(tmp_path: Path) -> None:
    images = tmp_path / "images.zip"
    with (
        zipfile.ZipFile(SHARED / "data" / "cifar10-train.zip") as whole,
        zipfile.ZipFile(images, "w") as part,
    ):
        for name in [
            name for name in whole.namelist() if name.endswith(("0001.jpg", "0002.jpg", "0003.jpg"))
        ]:
            part.writestr(name, whole.read(name))
    latents = tmp_path / "latents"
    done = prepare(PrepareRequest(str(images), str(latents), autoencoder=str(AUTOENCODER), resolution=32))
    assert (done.info.shape, done.info.classes) == ((4, 4, 4), 10)
    space = "search.space={objective: [{method: soflow}, {method: flow_matching, drop: 0.1}], optimizer.lr: [1e-3, 1e-4]}"
    small = ("training.steps=8", "training.batch=8", "evaluation.every=8", "evaluation.samples=32", space)
    ways = "comparison=[{steps: [1, 2]}]"
    settings = [f"data.source={latents}", "evaluation.grid=2", "search.final.seeds=2", *small, ways]
    sweep = ["methods-cifar10-latents-tuned", *(word for each in settings for word in ("--set", each))]
    page, plot = tmp_path / "comparison.md", tmp_path / "plot.png"
    for line in (
        ["run", *sweep],
        ["compare", *sweep, "--no-costs", "--markdown", str(page), "--plot", str(plot)],
    ):
        ended = subprocess.run(
            command(*line, "--storage", str(tmp_path / "runs")),
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
    text = page.read_text()
    assert (
        text.count("| soflow | no | - | 8 | 1 | ")
        == text.count("| flow_matching | no | euler | 8 | 2 | ")
        == 1
    )
    assert "the 4 trial(s) of " in text
    assert "seeds: 2;" in text
    assert Image.open(plot).format == "PNG"
