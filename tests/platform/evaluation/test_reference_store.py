"""Stored images as reference or target: all or a random part, of one size, in one space, read again when they have changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from soflow_core.failures import InputError
from soflow_pipelines.references.statistics_job import StatisticsJob
from soflow_pipelines.references.stored_images import StoredImages
from soflow_pipelines.sources.digits import load_digits
from soflow_platform.evaluation import protocol
from soflow_platform.evaluation.runner import LocalStatisticsRunner
from soflow_platform.jobs.evaluate import Score
from soflow_platform.storage.project import ProjectFolder
from tests.support.scored_sweep import SWEEP, scores_of
from tests.support.small_networks import exported, latent_set

TRIAL = f"{SWEEP}/trial-01-flow_matching"
DIGITS = load_digits()
FD: dict[str, Any] = {"features": "digits-classifier", "metrics": ("fd",)}


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[StatisticsJob]:
    """The statistics that are computed, each in another working folder than that of the command."""
    compute, seen = LocalStatisticsRunner.statistics, []

    def statistics(self: LocalStatisticsRunner, jobs: list[StatisticsJob]) -> Any:
        here = Path.cwd()
        os.chdir("/")
        try:
            seen.extend(jobs)
            return compute(self, jobs)
        finally:
            os.chdir(here)

    monkeypatch.setattr(LocalStatisticsRunner, "statistics", statistics)
    return seen


def run(storage: ProjectFolder, target: str, **settings: Any) -> Score:
    (score,) = scores_of(storage, target, **settings)
    return score


def folder_of(root: Path, images: np.ndarray, side: int | None = None, form: str = "png") -> str:
    """A flat folder of grey images (N, H, W), enlarged or reduced to `side`."""
    root.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        (image.resize((side, side)) if side else image).save(root / f"{number:04d}.{form}")
    return str(root)


def by_class(root: Path) -> str:
    """All digits, a folder for each class."""
    for label in range(10):
        folder_of(root / str(label), DIGITS.images[label == DIGITS.labels, 0])
    return str(root)


def as_npz(path: Path, images: np.ndarray) -> str:
    np.savez(path, arr_0=np.ascontiguousarray(images.transpose(0, 2, 3, 1)))
    return str(path)


def test_a_reference_whose_files_were_replaced_is_described_anew(
    scored: ProjectFolder, tmp_path: Path
) -> None:
    images = DIGITS.images[:200, 0]
    # Bitmaps of one size have one number of bytes: names and sizes stay.
    real = folder_of(tmp_path / "real", images, form="bmp")
    before = run(scored, TRIAL, reference=real, **FD)
    assert run(scored, TRIAL, reference=real, **FD) == before
    folder_of(tmp_path / "real", 255 - images, form="bmp")
    after = run(scored, TRIAL, reference=real, **FD)
    assert after.tags["reference_digest"] != before.tags["reference_digest"]
    assert abs(after.values["fd"] / before.values["fd"] - 1) > 0.05


def test_a_part_of_a_folder_is_a_fair_one_and_is_flagged(scored: ProjectFolder, tmp_path: Path) -> None:
    sorted_by_class = by_class(tmp_path / "real")
    settings = {**FD, "reference": str(scored.data / "digits")}
    part = run(scored, sorted_by_class, num=360, **settings)
    (flag,) = [flag for flag in part.flags if "fixed permutation" in flag]
    assert flag.startswith(f"360 of the 1797 images of {sorted_by_class} are scored")
    rows = np.random.default_rng(0).permutation(1797)[:360]
    fair = run(scored, folder_of(tmp_path / "fair", DIGITS.images[rows, 0]), num=None, **settings)
    first = run(
        scored, folder_of(tmp_path / "first", DIGITS.images[DIGITS.labels < 2, 0]), num=None, **settings
    )
    assert part.values["fd"] < 3 * fair.values["fd"] < first.values["fd"] / 3
    assert fair.flags == []


def test_images_sorted_by_class_have_the_same_inception_score(scored: ProjectFolder, tmp_path: Path) -> None:
    """Compared with the same images in a mixed order."""
    settings: dict[str, Any] = {"num": None, "features": "digits-classifier", "metrics": ("is",)}
    mixed = run(scored, as_npz(tmp_path / "mixed.npz", DIGITS.images), **settings)
    in_order = DIGITS.images[np.argsort(DIGITS.labels, kind="stable")]
    for target in (by_class(tmp_path / "sorted"), as_npz(tmp_path / "sorted.npz", in_order)):
        assert run(scored, target, **settings).values["is"] == pytest.approx(mixed.values["is"], rel=0.02)
    assert mixed.values["is"] > 8


def test_pooled_features_compare_samples_in_the_training_space_alone(
    scored: ProjectFolder, tmp_path: Path
) -> None:
    npz = as_npz(tmp_path / "digits.npz", DIGITS.images[:50])
    with pytest.raises(
        InputError, match=r"pooled looks at the training space: its reference is a shard set, not"
    ):
        run(scored, TRIAL, features="pooled", reference=npz)
    with pytest.raises(InputError, match=r"holds images and pooled looks at the training space of a network"):
        run(scored, npz, num=None, features="pooled", reference=str(scored.data / "digits"))
    assert run(scored, TRIAL, features="pooled").values["fd"] > 0


def test_a_reference_of_larger_images_is_cropped_and_flagged(scored: ProjectFolder, tmp_path: Path) -> None:
    images = DIGITS.images[:200, 0]
    same = run(scored, TRIAL, reference=folder_of(tmp_path / "same", images), **FD)
    assert "reference_crop" not in same.tags
    assert not any("cropped" in flag for flag in same.flags)
    large = run(scored, TRIAL, reference=folder_of(tmp_path / "large", images, side=32), **FD)
    assert large.tags["reference_crop"] == "adm8"
    assert any(flag.endswith("were scaled and cropped to 8 x 8 as ADM does.") for flag in large.flags)


def test_a_reference_of_another_size_is_refused_before_an_image_is_made(
    scored: ProjectFolder, tmp_path: Path, asked: list[StatisticsJob]
) -> None:
    images = DIGITS.images[:20, 0]
    small = folder_of(tmp_path / "small", images, side=3)
    with pytest.raises(
        InputError, match=r"\.png is 3 x 3, smaller than the 8 x 8 that is wanted: images are not"
    ):
        run(scored, TRIAL, reference=small, **FD)
    twice = DIGITS.images[:20].repeat(2, axis=2).repeat(2, axis=3)
    with pytest.raises(InputError, match=r"r16\.npz are 16 x 16, the samples 8 x 8: take a reference of"):
        run(scored, TRIAL, reference=as_npz(tmp_path / "r16.npz", twice), **FD)
    assert asked == []


def test_statistics_of_a_reference_file_are_computed_in_blocks(
    scored: ProjectFolder, tmp_path: Path, asked: list[StatisticsJob]
) -> None:
    npz = as_npz(tmp_path / "real.npz", DIGITS.images[:200])
    score = run(scored, TRIAL, reference=npz, features="digits-classifier", metrics=("fd", "kid"))
    reference, generated = asked
    assert isinstance(reference.images, StoredImages)
    assert (reference.images.place, reference.images.count) == (npz, 200)
    assert reference.metrics == ("fd", "kid")
    assert generated.images.count == 100
    assert score.tags["reference_samples"] == "200"
    asked.clear()
    run(scored, TRIAL, reference=npz, features="digits-classifier", metrics=("fd", "kid"), seed=1)
    assert [type(m.images).__name__ for m in asked] == ["GeneratedImages"]


def test_references_are_found_by_the_names_that_people_type(
    scored: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "real", DIGITS.images[:200, 0])
    as_npz(tmp_path / "real.npz", DIGITS.images[:200])
    places = (str(tmp_path / "real"), "cifar10:real", "cifar10:~/real", "~/real", "~/real.npz", "real.npz")
    values = [run(scored, TRIAL, reference=place, **FD).values["fd"] for place in places]
    assert values == pytest.approx([values[0]] * len(places), rel=1e-6)


def test_features_of_ones_own_are_found_by_actors_elsewhere(
    scored: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path, channels=1, size=8)
    monkeypatch.chdir(tmp_path)
    assert run(scored, TRIAL, features="file:net.pt2", metrics=("fd",)).values["fd"] > 0


UNUSED: list[tuple[dict[str, Any], str]] = [
    ({"steps": (2,)}, "--steps"),
    ({"labels": "balanced"}, "--labels"),
    ({"seed": 7}, "--seed"),
    ({"settings": {"sampler": "heun"}}, "--sampler"),
    ({"settings": {"sampling_scale": 2.0}}, "--guidance"),
    ({"settings": {"sampling_times": [0.5]}}, "--times"),
    ({"settings": {"sampling_grid": "power"}}, "--grid"),
    ({"autoencoder": "/nowhere"}, "--autoencoder"),
]


@pytest.mark.parametrize(("settings", "option"), UNUSED)
def test_an_option_that_changes_nothing_of_images_is_refused_by_name(
    scored: ProjectFolder, tmp_path: Path, settings: dict[str, Any], option: str
) -> None:
    folder = folder_of(tmp_path / "images", DIGITS.images[:20, 0])
    with pytest.raises(InputError, match=f"holds images: {option} is for .*, leave it out"):
        run(scored, folder, num=None, features="digits-classifier", metrics=("is",), **settings)


def test_a_set_of_latents_is_scored_as_the_images_they_decode_to(
    scored: ProjectFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, latents, images = latent_set(tmp_path)
    settings: dict[str, Any] = {
        "num": None,
        "metrics": ("fd",),
        "features": exported(tmp_path / "net", 3, 16),
    }
    monkeypatch.chdir(tmp_path)
    decoded = run(scored, str(latents), reference=str(images), autoencoder="autoencoder", **settings)
    assert decoded.values["fd"] > 0
    assert decoded.tags["autoencoder"].startswith("autoencoder (")
    itself = run(scored, str(latents), reference=str(latents), autoencoder="autoencoder", **settings)
    assert itself.values["fd"] == pytest.approx(0, abs=1e-6)
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="Name its folder with --autoencoder"):
        run(scored, str(latents), reference=str(images), **settings)


def test_a_stored_score_of_another_evaluator_version_is_not_used(
    scored: ProjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run(scored, TRIAL)
    monkeypatch.setattr(protocol, "EVALUATOR", "another")
    after = run(scored, TRIAL)
    assert (after.tags["evaluator"], after.values) == ("another", before.values)
    assert len(list((scored.root / "evaluations" / "results").iterdir())) == 2
