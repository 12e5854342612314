"""Sets of generated images: the same bytes however they are made, complete or refused, readable by others, checked index by index."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image

from soflow_core.failures import InputError
from soflow_pipelines.shards.tables import read_info
from soflow_platform.errors import UserError
from soflow_platform.generation.finished_set import verify
from soflow_platform.generation.generator import Generator
from soflow_platform.generation.parts import PartMaker
from soflow_platform.jobs import generate as job
from tests.support.generators import (
    NAMES,
    digests,
    interrupt_set,
    make_set,
    save_digits_generator,
    save_generator,
)
from tests.support.small_networks import latent_set

FORMATS = ("png", "webdataset", "parquet", "npz", "latents")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_generator(tmp_path_factory.mktemp("model") / "ema.safetensors")


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("latent_model")
    autoencoder, data, _ = latent_set(root)
    return save_generator(root / "ema.safetensors", read_info(data)), autoencoder


@pytest.fixture(scope="module")
def sets(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished set of 150 images, in three parts, in each format."""
    root = tmp_path_factory.mktemp("sets")
    for kind in FORMATS:
        make_set(model, root / kind, num=150, format=kind, seed=5)
    return {kind: root / kind for kind in FORMATS}


def damages(out: Path) -> list[str]:
    return verify(str(out))[1]


def expected_images(model: Path, count: int, seed: int = 5) -> np.ndarray[Any, Any]:
    """(N, H, W) as the generator makes them."""
    torch.set_num_threads(1)
    images = Generator.open(model).images(range(count), [i % 10 for i in range(count)], seed, steps=1)
    return torch.cat(list(images))[:, 0].numpy()


def decoded(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("batch", [1, 7, 64, 200])
def test_the_batch_size_does_not_change_a_byte(
    model: Path, sets: dict[str, Path], tmp_path: Path, kind: str, batch: int
) -> None:
    make_set(model, tmp_path / "out", num=150, format=kind, seed=5, batch=batch)
    assert digests(tmp_path / "out") == digests(sets[kind])


def test_the_batch_size_does_not_change_decoded_latents(
    latent_model: tuple[Path, Path], tmp_path: Path
) -> None:
    model, autoencoder = latent_model
    made = {}
    for batch in (1, 7, 64):
        out = tmp_path / str(batch)
        make_set(model, out, num=70, format="webdataset", batch=batch, autoencoder=str(autoencoder))
        made[batch] = digests(out)
    assert made[1] == made[7] == made[64]
    assert len(decoded(tar_members(tmp_path / "7" / "part-000000.tar")["00000003.png"])) == 16


def tar_members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        members = [(each.name, archive.extractfile(each)) for each in archive]
    with tarfile.open(path) as archive:
        return {name: archive.extractfile(name).read() for name, _ in members}  # type: ignore[union-attr]


def test_the_order_of_parts_does_not_change_a_byte(
    model: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_here = job._made_here
    monkeypatch.setattr(job, "_made_here", lambda plan, tasks, *rest: made_here(plan, tasks[::-1], *rest))
    make_set(model, tmp_path / "out", num=150, format="parquet", seed=5)
    assert digests(tmp_path / "out") == digests(sets["parquet"])


@pytest.mark.parametrize("kind", FORMATS)
def test_an_interrupted_set_is_completed_with_the_same_bytes(
    model: Path, sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    interrupt_set(monkeypatch, 3, model, tmp_path / "out", num=150, format=kind, seed=5)
    with pytest.raises(UserError, match="is not finished: run its `soflowctl generate` again"):
        damages(tmp_path / "out")
    done = make_set(model, tmp_path / "out", num=150, format=kind, seed=5)
    assert (done.made, done.kept) == (22, 128)
    assert digests(tmp_path / "out") == digests(sets[kind])
    again = make_set(model, tmp_path / "out", num=150, format=kind, seed=5)
    assert (again.made, again.kept) == (0, 150)


@pytest.mark.parametrize("kind", ["png", "parquet", "npz"])
def test_what_was_removed_from_a_finished_set_is_made_again(
    model: Path, sets: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(sets[kind], out)
    file = {"png": "000066-label-6.png", "parquet": "part-000001.parquet", "npz": "samples.npz"}[kind]
    (out / file).unlink()
    assert any(f"{file} is missing" in damage for damage in damages(out))
    done = make_set(model, out, num=150, format=kind, seed=5)
    assert done.made == {"png": 1, "parquet": 64, "npz": 150}[kind]
    assert digests(out) == digests(sets[kind])


def test_the_manifest_lists_every_image_once_with_its_digest(sets: dict[str, Path]) -> None:
    for kind, out in sets.items():
        manifest = pq.read_table(out / "manifest.parquet")
        assert manifest["index"].to_pylist() == list(range(150))
        assert manifest["label"].to_pylist() == [i % 10 for i in range(150)]
        assert manifest["class_name"].to_pylist() == [NAMES[i % 10] for i in range(150)]
        assert set(manifest["seed"].to_pylist()) == {5}
        assert set(manifest["part"].to_pylist()) <= {path.name for path in out.iterdir()}
        assert verify(str(out)) == (150, []), kind


def test_each_format_holds_the_images_of_the_generator(model: Path, sets: dict[str, Path]) -> None:
    expected = expected_images(model, 150)
    files = sorted(path for path in sets["png"].glob("*.png") if path.name != "grid.png")
    assert np.array_equal(np.stack([decoded(path.read_bytes()) for path in files]), expected)

    urls = [str(path) for path in sorted(sets["webdataset"].glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    assert np.array_equal(np.stack([image[..., 0] for image, _ in samples]), expected)
    assert [label for _, label in samples] == [i % 10 for i in range(150)]

    table = pq.read_table(sorted(sets["parquet"].glob("part-*.parquet")))
    assert np.array_equal(np.stack([decoded(row["bytes"]) for row in table["image"].to_pylist()]), expected)
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"]["names"] == list(NAMES)

    with np.load(sets["npz"] / "samples.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_0"].shape == (150, 8, 8, 3)
        assert np.array_equal(arrays["arr_0"], np.repeat(expected[..., None], 3, axis=3))
        assert np.array_equal(arrays["arr_1"], np.arange(150) % 10)

    stored = tar_members(sets["latents"] / "part-000001.tar")["00000100.npy"]
    (sample,) = Generator.open(model).samples([100], [0], seed=5, steps=1)
    assert np.array_equal(np.load(io.BytesIO(stored)), sample[0].numpy())


def test_a_folder_of_another_command_is_refused_with_what_differs(
    model: Path, sets: dict[str, Path], tmp_path: Path
) -> None:
    before = digests(sets["webdataset"])
    for changed, said in (
        ({"seed": 6}, "seed 5, now 6"),
        ({"num": 151}, "num 150, now 151"),
        ({"steps": 2}, "steps 1, now 2"),
        ({"format": "png"}, "format webdataset, now png"),
        ({"labels": "3"}, "labels balanced, now 3"),
    ):
        with pytest.raises(UserError, match=rf"made with other settings \({said}\): choose another --out"):
            make_set(model, sets["webdataset"], **{"num": 150, "format": "webdataset", "seed": 5, **changed})
    (tmp_path / "000000-label-0.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds 000000-label-0\.png, which this command did not make"):
        make_set(model, tmp_path, num=10)
    assert digests(sets["webdataset"]) == before
    old = tmp_path / "old"
    old.mkdir()
    (old / "generation.json").write_text(
        '{"weights": "models:/digits/1", "steps": 1, "seed": 0, "label": null}'
    )
    with pytest.raises(UserError, match="holds images of an earlier version of soflow"):
        make_set(model, old, num=10)


def test_damage_is_found_in_every_format(sets: dict[str, Path], tmp_path: Path) -> None:
    files = {
        "png": "000010-label-0.png",
        "webdataset": "part-000001.tar",
        "parquet": "part-000001.parquet",
        "npz": "samples.npz",
        "latents": "part-000002.tar",
    }
    for kind, name in files.items():
        out = tmp_path / kind
        shutil.copytree(sets[kind], out)
        content = bytearray((out / name).read_bytes())
        content[len(content) // 2] ^= 1
        (out / name).write_bytes(content)
        assert any(damage.startswith(name) for damage in damages(out)), kind


def test_an_index_that_is_missing_or_comes_twice_is_named(sets: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(sets["webdataset"], out)
    manifest = pq.read_table(out / "manifest.parquet")
    pq.write_table(pa.concat_tables([manifest[:7], manifest[8:], manifest[20:21]]), out / "manifest.parquet")
    said = damages(out)
    assert "image 7 is missing from manifest.parquet" in said
    assert "image 20 is twice in manifest.parquet" in said
    assert "part-000000.tar: 00000007 is not listed in manifest.parquet" in said
    shutil.copy(out / "part-000000.tar", out / "part-000003.tar")
    assert "part-000003.tar is not listed in manifest.parquet" in damages(out)


def test_a_latent_model_needs_its_autoencoder_or_writes_latents(
    latent_model: tuple[Path, Path], tmp_path: Path
) -> None:
    model, _ = latent_model
    with pytest.raises(InputError, match=r"latents of the autoencoder autoencoder .* --autoencoder FOLDER"):
        make_set(model, tmp_path / "images", num=3)
    assert not (tmp_path / "images").exists()
    make_set(model, tmp_path / "latents", num=3, format="latents")
    stored = tar_members(tmp_path / "latents" / "part-000000.tar")["00000002.npy"]
    assert np.load(io.BytesIO(stored)).shape == (4, 8, 8)


def test_an_unconditional_network_makes_images_without_labels(tmp_path: Path) -> None:
    model = save_digits_generator(tmp_path / "ema.safetensors", conditional=False)
    for kind in FORMATS:
        make_set(model, tmp_path / kind, num=5, format=kind)
        assert damages(tmp_path / kind) == []
    assert (tmp_path / "png" / "000004.png").is_file()
    assert list(tar_members(tmp_path / "webdataset" / "part-000000.tar")) == [
        f"{i:08d}.png" for i in range(5)
    ]
    assert np.load(tmp_path / "npz" / "samples.npz").files == ["arr_0"]
    with pytest.raises(UserError, match="this network is unconditional: leave labels out"):
        make_set(model, tmp_path / "labelled", num=5, labels="0")


def test_two_commands_do_not_write_one_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, asked = PartMaker.make, []

    def meddled(maker: PartMaker, task: Any) -> int:
        if not asked:
            asked.append(task)
            with pytest.raises(UserError, match="another command is making images in"):
                make_set(model, tmp_path / "out", num=5)
        return make(maker, task)

    monkeypatch.setattr(PartMaker, "make", meddled)
    make_set(model, tmp_path / "out", num=5)
    assert asked
    assert damages(tmp_path / "out") == []
