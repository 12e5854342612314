"""Sets of images and reference statistics: from folders, ADM's files and shard sets, the same images give the same numbers."""

import dataclasses
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from soflow_pipelines.features import Features
from soflow_pipelines.images.encode import write_folder
from soflow_pipelines.metrics import GaussianMoments, Reference, ScoreError, ScoreStatistics, scores
from soflow_pipelines.metrics.precision_recall import squared_radii
from soflow_pipelines.metrics.reservoir import fixed_subset
from soflow_pipelines.references import reference_statistics
from soflow_pipelines.references.image_sets import NpzImages, PartOfImages, batches, open_image_set
from soflow_pipelines.references.reference_statistics import (
    cached_reference,
    reference_from_adm,
    reference_from_images,
    reference_from_set,
)
from soflow_pipelines.references.reference_store import open_reference
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.writer import Sample, write_shards
from soflow_pipelines.sources.source import SourceError

COUNT = 30
ALL = ("fid", "sfid", "kid", "precision", "recall")


class Painted:
    """Means of rows and columns; it goes by the name of the published Inception, whose statistics ADM's files hold."""

    id = "inception-1-6726825d"
    dim = 6
    metrics = frozenset({"fid", "sfid", "kid", "precision", "recall", "is"})
    warnings: tuple[str, ...] = ()
    space: Literal["images", "training"] = "images"

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> Features:
        self.seen += len(images)
        values = images.float()
        features = torch.cat([values.mean((2, 3)), values[:, :, 0].mean(2)], dim=1)
        return Features(features, features, values[:, :, 1, :4].flatten(1))


def pictures(seed: int = 0, count: int = COUNT, side: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def as_folder(folder: Path) -> Path:
    write_folder(pictures(), folder / "images")
    return folder / "images"


def as_npz(folder: Path) -> Path:
    labels = np.arange(COUNT)
    np.savez(folder / "samples.npz", pictures().transpose(0, 2, 3, 1), labels)
    return folder / "samples.npz"


def as_compressed_npz(folder: Path) -> Path:
    np.savez_compressed(folder / "samples.npz", pictures().transpose(0, 2, 3, 1))
    return folder / "samples.npz"


def as_shards(folder: Path) -> Path:
    info = DatasetInfo(kind="pixels", shape=(3, 8, 8), dtype="uint8", classes=7)
    samples = (Sample(f"{i:04d}", image, i % 7) for i, image in enumerate(pictures()))
    write_shards(samples, folder / "shards", info)
    return folder / "shards"


FORMS = [as_folder, as_npz, as_compressed_npz, as_shards]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_so_the_same_reference(tmp_path: Path, form) -> None:
    images = open_image_set(form(tmp_path))
    assert len(images) == COUNT
    for start, stop in ((0, 30), (7, 19), (19, 20), (3, 5)):
        np.testing.assert_array_equal(images.read(start, stop).numpy(), pictures()[start:stop])
    again = pickle.loads(pickle.dumps(images)) if form is not as_shards else images
    np.testing.assert_array_equal(torch.cat(list(batches(again, 8))).numpy(), pictures())
    found = reference_from_set(images, Painted(), ALL)
    exact = reference_from_images([torch.from_numpy(pictures())], Painted(), ALL, found.name)
    assert found.count == COUNT
    assert found.resolution == (8, 8)
    np.testing.assert_array_equal(found.samples, exact.samples)
    for part in ("moments", "spatial"):
        ours, theirs = getattr(found, part), getattr(exact, part)
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-12)
        np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=1e-9, atol=1e-9)


def test_labels_come_with_the_images_that_have_them(tmp_path: Path) -> None:
    for form, expected in ((as_npz, range(COUNT)), (as_shards, [i % 7 for i in range(COUNT)])):
        labels = open_image_set(form(tmp_path)).labels
        assert labels is not None
        assert labels.tolist() == list(expected)
    assert open_image_set(as_compressed_npz(tmp_path)).labels is None


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_a_set_is_the_same_in_every_form_and_not_its_beginning(tmp_path: Path, form) -> None:
    images = open_image_set(form(tmp_path))
    part = PartOfImages(images, 12)
    rows = fixed_subset(COUNT, 12)
    assert len(part) == 12
    np.testing.assert_array_equal(torch.cat(list(batches(part, 5))).numpy(), pictures()[rows])
    if images.labels is not None:
        assert part.labels is not None
        assert part.labels.tolist() == images.labels[rows].tolist()


def test_a_part_of_images_that_are_sorted_by_class_holds_every_class_alike() -> None:
    classes = np.arange(10_000) * 10 // 10_000
    counts = np.bincount(classes[fixed_subset(10_000, 1000)], minlength=10)
    # The standard deviation of each is 9.
    assert np.abs(counts - 100).max() < 40
    assert set(fixed_subset(10_000, 500)) < set(fixed_subset(10_000, 1000))


def test_images_are_cropped_but_never_enlarged(tmp_path: Path) -> None:
    write_folder(pictures(count=2, side=16), tmp_path / "images", names=["a", "b"])
    write_folder(pictures(count=1), tmp_path / "images", names=["c"])
    images = open_image_set(tmp_path / "images", resolution=12)
    assert images.read(0, 2).shape == (2, 3, 12, 12)
    with pytest.raises(SourceError, match=r"c\.png is 8 x 8, smaller than the 12 x 12 that is wanted"):
        images.read(0, 3)


def test_images_of_several_sizes_need_a_resolution_to_be_cropped_to(tmp_path: Path) -> None:
    write_folder(pictures(count=2), tmp_path / "images", names=["a", "b"])
    write_folder(pictures(count=1, side=16), tmp_path / "images", names=["c"])
    with pytest.raises(
        SourceError, match=r"c\.png is 16 x 16, the first image is 8 x 8: give the resolution"
    ):
        open_image_set(tmp_path / "images").read(0, 3)
    cropped = open_image_set(tmp_path / "images", resolution=4)
    assert cropped.read(0, 3).shape == (3, 3, 4, 4)
    assert cropped.digest != open_image_set(tmp_path / "images", resolution=8).digest


def adm_file(folder: Path, *keys: str, seed: int = 0) -> Path:
    """A reference batch in ADM's names: statistics of many images, and a few of them as they are."""
    features = Painted()(torch.from_numpy(pictures(seed, 500)))
    assert features.spatial is not None
    arrays: dict[str, np.ndarray] = {"arr_0": pictures(seed).transpose(0, 2, 3, 1)}
    for suffix, values in (("", features.features.numpy()), ("_s", features.spatial.numpy())):
        arrays |= {f"mu{suffix}": values.mean(0), f"sigma{suffix}": np.cov(values, rowvar=False)}
    np.savez(folder / "adm.npz", **{key: arrays[key] for key in keys})  # type: ignore[arg-type]
    return folder / "adm.npz"


EVERYTHING = ("arr_0", "mu", "sigma", "mu_s", "sigma_s")


def test_adms_statistics_are_used_and_its_images_for_the_rest(tmp_path: Path) -> None:
    network = Painted()
    real = reference_from_adm(adm_file(tmp_path, *EVERYTHING), network, ALL)
    assert network.seen == COUNT
    values = Painted()(torch.from_numpy(pictures(0, 500))).features.numpy()
    assert real.moments is not None
    assert real.moments.count is None
    np.testing.assert_array_equal(real.moments.mean, values.mean(0).astype(np.float64))
    np.testing.assert_array_equal(real.moments.covariance, np.cov(values, rowvar=False))
    assert real.spatial is not None
    assert real.spatial.dim == 12
    np.testing.assert_array_equal(real.samples, Painted()(torch.from_numpy(pictures())).features.numpy())
    generated = ScoreStatistics(Painted(), ALL, samples=40)
    generated.update(torch.arange(40), torch.from_numpy(pictures(5, 40)))
    result = scores(generated, real)
    assert set(result.values) == set(ALL)
    assert result.tags["reference_samples"] == "unknown"
    # The same statistics by hand: FID against 500 images, of which ADM's file has 30.
    exact = reference_from_images([torch.from_numpy(pictures(0, 500))], Painted(), ["fid"], "500")
    assert result.values["fid"] == pytest.approx(scores(generated, exact, ["fid"]).values["fid"], rel=1e-4)


def test_no_image_is_looked_at_where_the_file_has_the_statistics(tmp_path: Path) -> None:
    network = Painted()
    real = reference_from_adm(adm_file(tmp_path, *EVERYTHING), network, ("fid", "sfid"))
    assert network.seen == 0
    assert real.resolution == (8, 8)
    alone = reference_from_adm(adm_file(tmp_path, "mu", "sigma"), network, ["fid"])
    assert alone.resolution is None
    assert alone.spatial is None


def test_a_file_without_what_the_metric_needs_is_refused(tmp_path: Path) -> None:
    path = adm_file(tmp_path, "mu", "sigma")
    with pytest.raises(ScoreError, match=r"neither images nor statistics of inception-1-6726825d for sfid"):
        reference_from_adm(path, Painted(), ["fid", "sfid"])
    with pytest.raises(ScoreError, match=r"for kid; it holds mu, sigma"):
        reference_from_adm(path, Painted(), ["kid"])


def test_adms_statistics_are_used_with_the_published_inception_alone(tmp_path: Path) -> None:
    """For other weights or networks everything is taken of the images."""

    class Repainted(Painted):
        warnings = ("Not the published weights.",)

    class Other(Painted):
        id = "dinov2-1-d5383ea8"

    path = adm_file(tmp_path, *EVERYTHING)
    with pytest.raises(ScoreError, match="the weights in use are others"):
        reference_from_adm(path, Repainted(), ["fid"])
    other = reference_from_adm(path, Other(), ["fid"])
    assert other.moments is not None
    assert other.moments.count == other.count == COUNT


def test_statistics_of_another_width_are_refused() -> None:
    real = reference_from_images([torch.from_numpy(pictures())], Painted(), ["fid"], "adm")
    wide = dataclasses.replace(real, moments=GaussianMoments(np.zeros(7), np.eye(7)))
    generated = ScoreStatistics(Painted(), ["fid"])
    generated.update(torch.arange(COUNT), torch.from_numpy(pictures()))
    with pytest.raises(ScoreError, match="has 7 features for fid, the samples 6"):
        scores(generated, wide)


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"x": np.ones(3)}, "neither images"),
        ({"arr_0": np.ones((2, 8, 8, 3))}, "arr_0 is float64"),
        ({"arr_0": np.ones((2, 8, 8), np.uint8)}, r"images are uint8 \(N, H, W, 1 or 3\)"),
        ({"mu": np.ones(3), "sigma": np.ones((2, 2))}, "mu and sigma are damaged"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "mu and sigma are damaged"),
    ],
)
def test_files_that_are_no_references_are_named(tmp_path: Path, arrays: dict, match: str) -> None:
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(SourceError, match=rf"odd\.npz.*{match}"):
        reference_from_adm(tmp_path / "odd.npz", Painted(), ["fid"])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "none.npz").write_bytes(b"no zip")
    content = as_npz(tmp_path).read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    for name in ("none", "cut"):
        with pytest.raises(SourceError, match=rf"{name}\.npz is not an \.npz file that can be read"):
            NpzImages(tmp_path / f"{name}.npz")
        with pytest.raises(SourceError, match=rf"{name}\.npz is not an \.npz file that can be read"):
            reference_from_adm(tmp_path / f"{name}.npz", Painted(), ["fid"])
    place = content.index(pictures().transpose(0, 2, 3, 1)[20, 4].tobytes())
    (tmp_path / "flipped.npz").write_bytes(
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    )
    with pytest.raises(SourceError, match=r"flipped\.npz: arr_0 is damaged \(Bad CRC-32"):
        list(batches(NpzImages(tmp_path / "flipped.npz")))


def test_arrays_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    images, path = pictures().transpose(0, 2, 3, 1), tmp_path / "x.npz"
    np.savez(path, images, np.array(["cat"] * COUNT, object))
    assert NpzImages(path).labels is None, "names, which numpy would have to unpickle"
    np.savez(path, mu=np.array([None] * 6), sigma=np.eye(6))
    with pytest.raises(SourceError, match=r"x\.npz: mu and sigma are damaged"):
        reference_from_adm(path, Painted(), ["fid"])
    content = as_npz(tmp_path).read_bytes()
    place = content.index(np.arange(COUNT).tobytes())
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(SourceError, match=r"x\.npz: arr_1 is damaged \(Bad CRC-32"):
        NpzImages(path)
    for other in (b"", b"\x93NUMPY\x01\x00" + bytes(200)):
        path.write_bytes(other)
        with pytest.raises(SourceError, match=r"x\.npz is not an \.npz file that can be read"):
            reference_from_adm(path, Painted(), ["fid"])


def test_a_kept_reference_is_not_made_again_unless_something_else_is_asked(tmp_path: Path) -> None:
    network, folder = Painted(), as_folder(tmp_path)
    first = open_reference(folder, network, ["fid"], tmp_path / "kept")
    again = open_reference(folder, network, ["fid"], tmp_path / "kept")
    assert network.seen == COUNT
    assert again.moments is not None
    assert first.moments is not None
    np.testing.assert_array_equal(again.moments.covariance, first.moments.covariance)
    open_reference(folder, network, ["fid"], tmp_path / "kept", resolution=4)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    open_reference(folder, network, ["kid"], tmp_path / "kept")
    npz = open_reference(as_npz(tmp_path), network, ["fid"], tmp_path / "kept")
    assert npz.name == "samples.npz"
    assert len(list((tmp_path / "kept").iterdir())) == 4


def test_a_kept_reference_is_of_one_version_of_the_evaluator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, folder = Painted(), as_folder(tmp_path)
    open_reference(folder, network, ["fid"], tmp_path / "kept")
    monkeypatch.setattr(reference_statistics, "EVALUATOR", "another")
    open_reference(folder, network, ["fid"], tmp_path / "kept")
    assert network.seen == 2 * COUNT


def test_kept_references_differ_by_data_features_and_preprocessing(tmp_path: Path) -> None:
    real = reference_from_images([torch.from_numpy(pictures())], Painted(), ["fid"], "paint")
    made = []

    def make() -> Reference:
        made.append(1)
        return real

    for digest, features, metrics in (
        ("sha256:aa", "x", ["fid"]),
        ("sha256:bb", "x", ["fid"]),
        ("sha256:aa", "y", ["fid"]),
        ("sha256:aa", "x", ["fid", "kid"]),
        ("sha256:aa", "x", ["kid", "fid"]),
    ):
        assert cached_reference(tmp_path, digest, features, metrics, make).name == "paint"
    assert len(made) == 4


@pytest.mark.parametrize(
    ("metrics", "large", "kept"),
    [(["kid"], False, False), (["recall"], False, True), (["recall"], True, False)],
)
def test_radii_of_the_real_manifold_are_kept_where_a_metric_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metrics: list[str], large: bool, kept: bool
) -> None:
    """Also in a file of a version that did not keep them; those that take long on a CPU are left to the scores."""
    real = reference_from_images([torch.from_numpy(pictures())], Painted(), metrics, "paint")
    assert real.radii is None
    if large:
        monkeypatch.setattr(reference_statistics, "FAST_MANIFOLD", 10)
    for make in (lambda: real, lambda: pytest.fail("made anew")):
        found = cached_reference(tmp_path, "sha256:aa", "x", metrics, make)
        (path,) = tmp_path.iterdir()
        for reference in (found, Reference.load(path)):
            assert (reference.radii is not None) == kept
    radii = found.manifold()
    assert radii is not None
    assert found.manifold() is radii
    assert found.samples is not None
    assert np.array_equal(radii, squared_radii(found.samples))


@pytest.mark.parametrize(
    ("digest", "features", "metrics", "name"),
    [
        (
            f"sha256:{'ab' * 32}",
            "colours-1",
            ["fid", "kid"],
            "reference-abababababababab-colours-1-4f897d08.npz",
        ),
        (
            f"{'cd' * 32}-adm64",
            "inception-1-6726825d",
            ["fid"],
            "reference-cdcdcdcdcdcdcdcd-inception-1-6726825d-8e5b49cd.npz",
        ),
    ],
)
def test_a_reference_kept_by_version_0_1_0_is_found(
    tmp_path: Path, digest: str, features: str, metrics: list[str], name: str
) -> None:
    reference_from_images([torch.from_numpy(pictures())], Painted(), ["fid"], "paint").save(tmp_path / name)
    found = cached_reference(tmp_path, digest, features, metrics, lambda: pytest.fail("made anew"))
    assert found.name == "paint"


def test_places_that_hold_no_reference_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"there is no file .*missing\.npz"):
        open_reference(tmp_path / "missing.npz", Painted(), ["fid"], tmp_path)
    with pytest.raises(SourceError, match=r"missing does not exist"):
        open_reference(tmp_path / "missing", Painted(), ["fid"], tmp_path)


class Doubling:
    """An autoencoder whose decoder repeats each latent value in a block of 2 x 2."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_latents_are_decoded_from_their_means_or_refused(tmp_path: Path) -> None:
    info = DatasetInfo(
        kind="latents", shape=(3, 4, 4), dtype="float32", autoencoder="vae", scaling=0.5, shift=1
    )
    means = np.random.default_rng(0).uniform(-1, 3, (5, 3, 4, 4)).astype(np.float32)
    arrays = np.concatenate([means, np.full_like(means, 0.1)], axis=1)
    samples = (Sample(f"{i}", array) for i, array in enumerate(arrays))
    write_shards(samples, tmp_path / "latents", info)
    with pytest.raises(SourceError, match="holds latents: images of them need the autoencoder vae"):
        open_image_set(tmp_path / "latents")
    images = open_image_set(tmp_path / "latents", decoder=Doubling())
    expected = np.floor(np.clip(127.5 * (means - 1) * 0.5 + 128, 0, 255)).astype(np.uint8)
    np.testing.assert_array_equal(images.read(1, 4)[:, :, ::2, ::2].numpy(), expected[1:4])
    assert images.name.endswith(", decoded")
