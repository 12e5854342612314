"""Latents in HDF5 become a shard set by the command, which names what a training decodes its sample grids with."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import read_info
from tests.support.commands import Run
from tests.support.small_networks import latent_set

COUNT = 24


@pytest.mark.slow
def test_the_command_takes_latents_in_hdf5_as_they_are(soflowctl: Run, tmp_path: Path) -> None:
    autoencoder, _, _ = latent_set(tmp_path / "small")
    images = torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = load_autoencoder(str(autoencoder)).encode(images).numpy()
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["latents"], file["labels"] = moments, np.arange(COUNT) % 3
    prepare = ("data", "prepare", "train.h5", "--out", "set", "--dtype", "float32")
    refused = soflowctl(*prepare, cwd=tmp_path)
    assert refused.returncode == 2
    assert "--autoencoder" in refused.stderr
    assert not (tmp_path / "set").exists()
    done = soflowctl(*prepare, "--autoencoder", str(autoencoder), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{COUNT} samples of latents, 4 x 8 x 8, 3 classes" in done.stdout
    assert f"--set data.source=set --set evaluation.autoencoder={autoencoder}" in done.stdout
    assert read_info(tmp_path / "set").autoencoder_digest == load_autoencoder(str(autoencoder)).facts.digest
    with ShardLoader(tmp_path / "set", batch_size=COUNT, posterior="moments") as loader:
        stored = {found.numpy().tobytes() for found in next(loader).x0}
    assert stored == {moment.tobytes() for moment in moments}
