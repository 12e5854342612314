"""Statistics computed in blocks equal those of all images at once, in whatever order and by whichever processes blocks are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from soflow_core.failures import InputError
from soflow_core.samplers.noise import sample_labels
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.metrics import Reference, ScoreStatistics
from soflow_pipelines.references.statistics_job import (
    LARGEST_BLOCK,
    LocalStatistics,
    StatisticsJob,
    compute_block,
)
from soflow_pipelines.references.stored_images import StoredImages, stored_shard_set
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.digits import load_digits
from soflow_platform.errors import UserError
from soflow_platform.evaluation import block_store
from soflow_platform.evaluation.block_store import BlockStore
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.evaluation.image_sources import GeneratedImages
from soflow_platform.evaluation.runner import LocalStatisticsRunner
from soflow_platform.generation.generator import BATCH, Generator
from soflow_platform.jobs.targets import find_target
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from tests.support.scored_sweep import SWEEP


@pytest.fixture
def weights(scored_once: ProjectFolder) -> Path:
    found = find_target(
        f"{SWEEP}/trial-00-soflow", scored_once, TrackingStore(scored_once.tracking_uri)
    ).weights
    assert found is not None
    return found


@pytest.fixture
def job(weights: Path, scored_once: ProjectFolder) -> StatisticsJob:
    images = GeneratedImages(str(weights), "digest", steps=2, seed=3, labels="uniform", count=200)
    network = feature_network("digits-classifier", (1, 8, 8), scored_once)
    return StatisticsJob(images, "digits-classifier", network.id, ("fd", "kid", "is", "label_agreement"))


def make(job: StatisticsJob, scored_once: ProjectFolder, folder: BlockStore, blocks: list[int]) -> None:
    network = feature_network(job.features, (1, 8, 8), scored_once)
    for block in blocks:
        opened = job.images.open("cpu")
        folder.publish(block, compute_block(job, block, opened, network))


def test_a_sample_is_the_same_in_whichever_block_it_is_made(job: StatisticsJob, weights: Path) -> None:
    opened = job.images.open("cpu")
    whole = torch.cat([opened.read(start, start + BATCH)[0] for start in (0, 64, 128)])
    alone, labels = opened.read(70, 71)
    assert torch.equal(alone[0], whole[70])
    generator = Generator.open(weights)
    (again,) = generator.samples([70], sample_labels(3, torch.tensor([70]), 10), seed=3, steps=2)
    assert torch.equal(again, alone)
    assert labels is not None
    assert torch.equal(labels, sample_labels(3, torch.tensor([70]), 10))


def test_statistics_are_bit_equal_in_whatever_order_blocks_are_made(
    job: StatisticsJob, scored_once: ProjectFolder, tmp_path: Path
) -> None:
    folders = [BlockStore.of(job, tmp_path / name) for name in ("one", "two")]
    assert folders[0].missing() == [0, 1, 2, 3]
    make(job, scored_once, folders[0], [0, 1, 2, 3])
    make(job, scored_once, folders[1], [3, 1])
    assert folders[1].missing() == [0, 2]
    make(job, scored_once, folders[1], folders[1].missing())
    states = [folder.whole().state() for folder in folders]
    for key in states[0]:
        assert np.array_equal(states[0][key], states[1][key]), key
    assert [path.name for path in folders[0].folder.iterdir()] == ["statistics.npz"]
    assert folders[0].missing() == []
    again = folders[0].whole().state()
    assert all(np.array_equal(again[key], states[0][key]) for key in again)


def test_merged_blocks_are_the_statistics_of_all_images_at_once(
    job: StatisticsJob, scored_once: ProjectFolder, tmp_path: Path
) -> None:
    folder = BlockStore.of(job, tmp_path)
    make(job, scored_once, folder, folder.missing())
    merged = folder.whole()
    opened = job.images.open("cpu")
    parts = [opened.read(start, min(start + BATCH, 200)) for start in range(0, 200, BATCH)]
    network = feature_network(job.features, (1, 8, 8), scored_once)
    whole = ScoreStatistics(network, job.metrics, samples=200)
    whole.update(
        torch.arange(200),
        torch.cat([part[0] for part in parts]),
        torch.cat([p[1] for p in parts if p[1] is not None]),
    )
    assert merged.count == whole.count == 200
    one, other = merged.state(), whole.state()
    assert one["agreed"] == other["agreed"]
    np.testing.assert_allclose(one["moments.mean"], other["moments.mean"], rtol=1e-6)
    np.testing.assert_allclose(one["moments.scatter"], other["moments.scatter"], rtol=1e-5, atol=1e-5)
    merged.check_complete()


def test_samples_of_a_shard_set_are_read_as_a_network_sees_them(
    scored_once: ProjectFolder, tmp_path: Path
) -> None:
    """Each is read once."""
    place = str(scored_once.data / "digits")
    images = stored_shard_set(place, read_info(place), None, decode_latents=False)
    network = feature_network("pooled", (1, 8, 8), scored_once)
    job = StatisticsJob(images, "pooled", network.id, ("fd", "kid"), (1, 8, 8))
    folder = BlockStore.of(job, tmp_path)
    make(job, scored_once, folder, folder.missing()[::-1])
    whole = folder.whole()
    whole.check_complete()
    exact = to_unit_range(torch.from_numpy(load_digits().images)).flatten(1).double()
    moments = Reference.of(whole, "digits").moments
    assert moments is not None
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(moments.covariance, exact.T.cov(), rtol=1e-5, atol=1e-9)
    local = LocalStatistics(network)(job).state()
    assert all(np.array_equal(local[key], value) for key, value in whole.state().items())


def test_the_weights_of_a_sample_that_is_not_finite_are_refused(
    job: StatisticsJob, scored_once: ProjectFolder
) -> None:
    opened: Any = job.images.open("cpu")
    with torch.no_grad():
        next(iter(opened.generator.network.parameters())).fill_(float("nan"))
    network = feature_network(job.features, (1, 8, 8), scored_once)
    with pytest.raises(UserError, match="image 64 that these weights make is not finite"):
        compute_block(job, 1, opened, network)


CHANGES: dict[str, Callable[[StatisticsJob], StatisticsJob]] = {
    "weights": lambda m: replace(m, images=replace(m.images, digest="other")),
    "steps": lambda m: replace(m, images=replace(m.images, steps=1)),
    "seed": lambda m: replace(m, images=replace(m.images, seed=4)),
    "labels": lambda m: replace(m, images=replace(m.images, labels="balanced")),
    "count": lambda m: replace(m, images=replace(m.images, count=201)),
    "sampler": lambda m: replace(m, images=replace(m.images, sampling={"sampler": "heun"})),
    "features": lambda m: replace(m, features_id="digits-cnn-1-00000000"),
    "metrics": lambda m: replace(m, metrics=("fd",)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_setting_that_moves_the_statistics_changes_the_key(job: StatisticsJob, what: str) -> None:
    assert CHANGES[what](job).key != job.key


def test_another_version_of_the_evaluator_changes_the_key(
    job: StatisticsJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = job.key
    monkeypatch.setattr("soflow_pipelines.references.statistics_job.EVALUATOR", "another")
    assert job.key != before


def test_blocks_that_another_command_merges_meanwhile_are_found(
    job: StatisticsJob, scored_once: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = BlockStore.of(job, tmp_path)
    make(job, scored_once, folder, folder.missing())
    load = block_store._load
    other: list[ScoreStatistics] = []

    def overtaken(path: Path) -> ScoreStatistics:
        if path.name == "block-000001.npz" and not other:
            monkeypatch.setattr(block_store, "_load", load)
            other.append(folder.whole())
        return load(path)

    monkeypatch.setattr(block_store, "_load", overtaken)
    mine = folder.whole()
    assert len(other) == 1
    assert np.array_equal(mine.state()["moments.mean"], other[0].state()["moments.mean"])
    assert [path.name for path in folder.folder.iterdir()] == ["statistics.npz"]


def test_a_block_that_is_missing_is_no_whole(
    job: StatisticsJob, scored_once: ProjectFolder, tmp_path: Path
) -> None:
    folder = BlockStore.of(job, tmp_path)
    make(job, scored_once, folder, [0, 2, 3])
    with pytest.raises(FileNotFoundError, match="block-000001"):
        folder.whole()


def test_where_the_weights_lie_does_not_change_the_key(job: StatisticsJob) -> None:
    assert replace(job, images=replace(job.images, weights="/elsewhere")).key == job.key


@pytest.mark.parametrize(
    ("count", "block", "blocks"),
    [(2, 64, 1), (64, 64, 1), (200, 64, 4), (2000, 128, 16), (10_000, 640, 16), (50_000, LARGEST_BLOCK, 49)],
)
def test_blocks_are_whole_batches_and_hold_every_image_once(count: int, block: int, blocks: int) -> None:
    cut = StatisticsJob(StoredImages("place", "digest", count), "inception", "id", ("fid",))
    assert (cut.block, cut.blocks) == (block, blocks)
    assert cut.block % BATCH == 0
    assert sum(cut.size(number) for number in range(cut.blocks)) == count


def test_a_machine_with_other_feature_weights_refuses_the_work(
    job: StatisticsJob, scored_once: ProjectFolder
) -> None:
    runner = LocalStatisticsRunner(scored_once)
    with pytest.raises(InputError, match=r"this machine has digits-cnn-1-\w+ where the command found other"):
        runner.one(replace(job, features_id="other"))


KEYS_OF_0_1_0: list[tuple[StatisticsJob, str]] = [
    (
        StatisticsJob(
            GeneratedImages(
                "/w/ema.safetensors", "ab" * 32, 2, 3, "uniform", 200, {"sampler": "heun"}, "vae"
            ),
            "digits-classifier",
            "digits-cnn-1-0123abcd",
            ("fd", "kid"),
        ),
        "a3880471c4e5edc8599fda2b",
    ),
    (
        StatisticsJob(
            GeneratedImages("/w", "ab" * 32, 1, 0, "balanced", 50_000, decode_latents=False),
            "pooled",
            "pooled-4x8x8-1",
            ("fd",),
            (4, 32, 32),
        ),
        "0b7b39220be83da40c691d96",
    ),
    (
        StatisticsJob(
            StoredImages("/data/images", "cd" * 32, 1797, 256),
            "inception",
            "inception-1-6726825d",
            ("fid", "is"),
        ),
        "e801a3b570011f8f1c49d575",
    ),
    (
        StatisticsJob(
            StoredImages("/data/latents", f"sha256:{'ef' * 32}-decoded", 40, None, "vae"),
            "inception",
            "inception-1-6726825d",
            ("fid",),
            (4, 8, 8),
        ),
        "86ad7d61ad14c2cd702f5fe2",
    ),
]


@pytest.mark.parametrize(("job", "key"), KEYS_OF_0_1_0)
def test_statistics_kept_by_version_0_1_0_are_found(job: StatisticsJob, key: str) -> None:
    assert job.key == key
