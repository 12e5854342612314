"""Latents in HDF5, as the official SoFlow code prepares them, become a shard set without being encoded again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from soflow_core.failures import InputError
from soflow_pipelines.images.codec import AutoencoderFacts
from soflow_pipelines.preparation.build import DamagedImages, prepare_locally
from soflow_pipelines.preparation.shard_plan import PreparationError, PrepareSettings, ShardPlan
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.sources.hdf5 import Hdf5Latents
from soflow_pipelines.sources.opening import SourceOptions, open_source
from soflow_pipelines.sources.source import SourceError
from soflow_pipelines.storage.opening import open_storage

FACTS = AutoencoderFacts("vae", "0" * 16, 4, 8, 0.18215, 0.0)
COUNT = 20


def latents(count: int = COUNT) -> np.ndarray[Any, Any]:
    """Means of both signs, and standard deviations."""
    random = np.random.default_rng(0)
    means, deviations = random.normal(0, 4, (count, 4, 4, 4)), random.uniform(0.1, 1, (count, 4, 4, 4))
    return np.concatenate([means, deviations], 1).astype(np.float32)


def write(path: Path, **arrays: Any) -> Path:
    contents = {"latents": latents(), "labels": np.arange(COUNT) % 5, **arrays}
    with h5py.File(path, "w") as file:
        for name, array in contents.items():
            if array is not None:
                file[name] = array
    return path


def prepared(path: Path, out: Path, options: SourceOptions | None = None, **settings: Any) -> DatasetInfo:
    chosen = PrepareSettings(**{"resolution": 256, "dtype": "float32", **settings})
    plan = ShardPlan(open_source(str(path), options), chosen, FACTS)
    return prepare_locally(plan, open_storage(out))


def test_latents_and_labels_are_stored_as_they_are(tmp_path: Path) -> None:
    info = prepared(write(tmp_path / "train.h5"), tmp_path / "set")
    assert (info.kind, info.shape, info.classes, info.resolution) == ("latents", (4, 4, 4), 5, 32)
    assert (info.autoencoder, info.scaling, info.crop) == ("vae", 0.18215, None)
    assert verify(tmp_path / "set") == []
    with ShardLoader(tmp_path / "set", batch_size=COUNT, posterior="moments") as loader:
        batch = next(loader)
    assert batch.labels is not None
    order = [int(np.flatnonzero((latents() == found.numpy()).all((1, 2, 3)))[0]) for found in batch.x0]
    assert sorted(order) == list(range(COUNT))
    assert batch.labels.tolist() == [row % 5 for row in order]


def test_a_set_without_labels_is_unconditional(tmp_path: Path) -> None:
    assert prepared(write(tmp_path / "a.h5", labels=None), tmp_path / "a").classes is None
    assert prepared(write(tmp_path / "b.h5"), tmp_path / "b", SourceOptions(unlabelled=True)).classes is None


def test_a_source_opens_its_file_again_in_another_process(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "train.h5")))
    copy = pickle.loads(pickle.dumps(source))
    assert np.array_equal(copy.moments(3), latents()[3])


def test_a_data_set_is_checked_once_and_not_for_each_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(write(tmp_path / "train.h5")))
    assert isinstance(source, Hdf5Latents)
    checked: list[str] = []
    monkeypatch.setattr(Hdf5Latents, "_check_storage", lambda _, name, _found: checked.append(name))
    assert all(np.array_equal(source.moments(row), latents()[row]) for row in range(COUNT))
    assert checked == []
    pickle.loads(pickle.dumps(source)).moments(0)
    assert checked == ["latents"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"latents": None}, "no data set `latents`"),
        ({"latents": np.zeros((COUNT, 8), np.float32)}, "must be floating-point"),
        ({"latents": np.zeros((COUNT, 8, 4, 4), np.int64)}, "must be floating-point"),
        ({"labels": np.arange(3)}, "one for each latent"),
        ({"labels": np.full(COUNT, -1)}, "the label -1 in row 0"),
        ({"latents": np.ones((COUNT, 6, 4, 4), np.float32)}, "latents of 3 channels, vae makes 4"),
        ({"latents": h5py.ExternalLink("other.h5", "latents")}, "does not lie in the file itself"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    write(tmp_path / "other.h5")
    with pytest.raises(InputError, match=message):
        prepared(write(tmp_path / "train.h5", **arrays), tmp_path / "set")


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (-1.0, "logarithms of variances")])
def test_rows_that_are_no_latents_are_named(tmp_path: Path, value: float, message: str) -> None:
    broken = latents()
    broken[7, 5, 0, 0] = value
    path = write(tmp_path / "train.h5", latents=broken)
    with pytest.raises(DamagedImages, match=rf"train.h5\[7\]: .*{message}"):
        prepared(path, tmp_path / "set")
    assert prepared(path, tmp_path / "rest", skip_damaged=True).samples == COUNT - 1


def test_latents_that_half_precision_does_not_hold_are_named(tmp_path: Path) -> None:
    """They would be stored as infinities, which a training meets as a loss that is not finite."""
    large = latents()
    large[7, 0, 0, 0] = 1e5
    path = write(tmp_path / "train.h5", latents=large)
    with pytest.raises(DamagedImages, match=r"train\.h5\[7\]: .* not finite in float16: --dtype float32"):
        prepared(path, tmp_path / "half", dtype="float16")
    assert prepared(path, tmp_path / "single").samples == COUNT


def test_latents_are_neither_mirrored_nor_taken_without_their_autoencoder(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5")
    with pytest.raises(PreparationError, match="--flips"):
        prepared(path, tmp_path / "set", flips=True)
    with pytest.raises(PreparationError, match="--autoencoder"):
        ShardPlan(open_source(str(path)), PrepareSettings(resolution=256))


def test_a_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.h5")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot be read as HDF5"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"shape": (10**11, 8, 4, 4), "chunks": (1, 8, 4, 4)},
            r"`latents` has [\d,]+ bytes, of which 0 are .*--max-growth",
        ),
        (
            {"shape": (2**20, 8, 4, 4), "chunks": (2**20, 8, 4, 4), "compression": "gzip"},
            "pieces of 512 MiB, .*--max-file-mb",
        ),
    ],
)
def test_what_would_unpack_to_far_more_is_refused_before_it_is_read(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with h5py.File(tmp_path / "train.h5", "w") as file:
        data = file.create_dataset("latents", dtype="f4", **settings)
        if "compression" in settings:
            # One piece is written as if it were whole: the file has its bytes, and nothing unpacks them here.
            data.id.write_direct_chunk((0, 0, 0, 0), bytes(2**19))
    assert (tmp_path / "train.h5").stat().st_size < 2**20
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path / "train.h5"))
