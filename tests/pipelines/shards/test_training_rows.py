"""Stored rows become training rows on the device: pixels as the loader scales them, latents drawn afresh by seed and position."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import LoadedBatch, ShardLoader
from soflow_pipelines.shards.training_rows import training_rows
from soflow_pipelines.shards.writer import Sample, write_shards

SAMPLES, BATCH = 48, 24
CPU = torch.device("cpu")
LATENTS = DatasetInfo(kind="latents", shape=(4, 8, 8), dtype="float16", classes=5, scaling=0.5, shift=1.0)
PIXELS = DatasetInfo(kind="pixels", shape=(3, 16, 16), dtype="uint8", classes=5)


def written(folder: Path, info: DatasetInfo) -> Path:
    rng = np.random.default_rng(0)
    if info.kind == "pixels":
        arrays = rng.integers(0, 256, (SAMPLES, *info.stored_shape)).astype(np.uint8)
    else:
        arrays = rng.random((SAMPLES, *info.stored_shape)).astype(np.float16)
    write_shards([Sample(f"{i:03d}", a, i % 5) for i, a in enumerate(arrays)], folder, info, per_shard=9)
    return folder


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("latents") / "set", LATENTS)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("pixels") / "set", PIXELS)


def stored(uri: Path, rank: int = 0, world: int = 1, consumed: int = 0) -> LoadedBatch:
    with ShardLoader(uri, BATCH, rank, world, seed=5, consumed=consumed, posterior="stored") as loader:
        return next(loader)


def drawn(uri: Path, rank: int = 0, world: int = 1, consumed: int = 0, device: torch.device = CPU) -> Tensor:
    batch = stored(uri, rank, world, consumed)
    info = LATENTS if batch.x0.dtype == torch.float16 else PIXELS
    return training_rows(batch.x0, batch.positions, info, seed=5, device=device)


def test_pixels_are_those_of_the_loader_to_the_last_bit(pixels: Path) -> None:
    assert stored(pixels).x0.dtype == torch.uint8
    with ShardLoader(pixels, BATCH, seed=5) as loader:
        assert torch.equal(drawn(pixels), next(loader).x0)


def test_latents_are_samples_of_their_posterior_whatever_the_ranks(latents: Path) -> None:
    batch, x0 = stored(latents), drawn(latents)
    assert batch.x0.dtype == torch.float16
    mean, std = batch.x0.float().chunk(2, dim=1)
    eps = ((x0 / 0.5 + 1.0) - mean) / std
    kept = std > 0.01
    assert abs(eps[kept].mean()) < 0.05
    assert abs(eps[kept].std() - 1) < 0.05
    for world in (2, 4):
        for rank in range(world):
            assert torch.equal(drawn(latents, rank, world), x0[rank::world])


def test_latents_are_drawn_afresh_in_the_next_epoch(latents: Path) -> None:
    batches = [stored(latents, consumed=consumed) for consumed in (0, BATCH, 2 * BATCH, 3 * BATCH)]
    rows = [drawn(latents, consumed=consumed) for consumed in (0, BATCH, 2 * BATCH, 3 * BATCH)]
    moments = torch.cat([batch.x0 for batch in batches]).flatten(1).float()
    same = torch.cdist(moments[SAMPLES:], moments[:SAMPLES]).argmin(1)
    assert sorted(same.tolist()) == list(range(SAMPLES))
    x0 = torch.cat(rows)
    assert (x0[SAMPLES:] - x0[:SAMPLES][same]).abs().flatten(1).amax(1).min() > 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_rows_of_a_cpu_to_the_last_bit(latents: Path, pixels: Path) -> None:
    for uri in (latents, pixels):
        assert torch.equal(drawn(uri, device=torch.device("cuda")).cpu(), drawn(uri))
