"""Preparation: the content of each shard, and that a resumed preparation ends with the same bytes."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from soflow_pipelines.images.codec import AutoencoderFacts
from soflow_pipelines.preparation.build import DamagedImages, ShardBuilder, prepare_locally
from soflow_pipelines.preparation.shard_plan import PreparationError, PrepareSettings, ShardPlan
from soflow_pipelines.preparation.state import begin, exclusive, finish
from soflow_pipelines.shards.info import ShardError
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import read_index, read_info
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage

IMAGES = 40


class Blocks:
    """An encoder: averages of 4 x 4 blocks as the mean, and a constant standard deviation."""

    facts = AutoencoderFacts("blocks", "0" * 16, 3, 4, 0.5, 0.0)

    def encode(self, images: Tensor) -> Tensor:
        mean = torch.nn.functional.avg_pool2d(images, 4)
        return torch.cat([mean, torch.full_like(mean, 0.125)], 1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        folder = tmp_path / "images" / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3)).astype(np.uint8)).save(folder / f"{number:03d}.png")
    return tmp_path / "images"


def plan_of(images: Path, latents: bool = False, **settings: object) -> ShardPlan:
    chosen = PrepareSettings(**{"resolution": 16, "batch": 4, **settings})  # type: ignore[arg-type]
    return ShardPlan(open_source(str(images)), chosen, Blocks.facts if latents else None)


def damaged_in(plan: ShardPlan, shard: int, store: ObjectStore) -> list[str]:
    try:
        ShardBuilder(plan, store).build(shard)
    except DamagedImages as error:
        return error.errors
    return []


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_image_is_there_once_with_its_label(images: Path, tmp_path: Path) -> None:
    plan = plan_of(images)
    info = prepare_locally(plan, open_storage(tmp_path / "out"), None)
    assert (info.samples, info.classes, info.shape, info.shards) == (IMAGES, 4, (3, 16, 16), 8)
    rows = read_index(tmp_path / "out").to_pylist()
    source = plan.source
    assert source.labels is not None
    assert {row["key"]: row["label"] for row in rows} == {
        f"{item:08d}": int(source.labels[item]) for item in range(IMAGES)
    }
    assert verify(tmp_path / "out") == []


def test_images_are_dealt_to_shards_out_of_the_sources_order(images: Path, tmp_path: Path) -> None:
    prepare_locally(plan_of(images), open_storage(tmp_path / "out"), None)
    rows = read_index(tmp_path / "out").to_pylist()
    order = [int(row["key"]) for row in rows]
    assert order != sorted(order)
    first = [row["label"] for row in rows if row["shard"] < 4]
    assert len(set(first)) == 4
    prepare_locally(plan_of(images, seed=1), open_storage(tmp_path / "other"), None)
    assert [int(row["key"]) for row in read_index(tmp_path / "other").to_pylist()] != order


@pytest.mark.parametrize("latents", [False, True])
def test_threads_do_not_change_the_bytes(images: Path, tmp_path: Path, latents: bool) -> None:
    for threads in (1, 4):
        encoder = Blocks() if latents else None
        prepare_locally(plan_of(images, latents), open_storage(tmp_path / str(threads)), encoder, threads)
    assert contents(tmp_path / "1") == contents(tmp_path / "4")


def test_a_resumed_preparation_builds_the_rest_to_the_same_bytes(images: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    prepare_locally(plan_of(images, True), open_storage(whole), Blocks())
    plan, store = plan_of(images, True), open_storage(cut)
    pending = begin(plan, store)
    assert pending == list(range(8))
    for shard in (5, 1):
        ShardBuilder(plan, store, Blocks()).build(shard)
    with pytest.raises(ShardError, match="no shard set"):
        read_info(cut)
    before = (cut / "shard-000005.tar").stat().st_mtime_ns
    again = plan_of(images, True)
    assert begin(again, store) == [0, 2, 3, 4, 6, 7]
    prepare_locally(again, store, Blocks())
    assert contents(cut) == contents(whole)
    assert (cut / "shard-000005.tar").stat().st_mtime_ns == before


def test_a_shard_without_its_record_or_a_record_without_it_is_built_again(
    images: Path, tmp_path: Path
) -> None:
    plan, store = plan_of(images), open_storage(tmp_path / "out")
    begin(plan, store)
    for shard in (0, 1, 2):
        ShardBuilder(plan, store).build(shard)
    (tmp_path / "out" / ".preparing" / "shard-000001.tar.parquet").unlink()
    (tmp_path / "out" / "shard-000002.tar").unlink()
    assert begin(plan, store) == [1, 2, 3, 4, 5, 6, 7]


def test_a_finished_set_is_left_alone_and_other_settings_are_refused(images: Path, tmp_path: Path) -> None:
    store = open_storage(tmp_path / "out")
    prepare_locally(plan_of(images), store, None)
    before = contents(tmp_path / "out")
    assert begin(plan_of(images), store) is None
    with pytest.raises(ShardError, match=r"finished set of other settings \(resolution 16 instead of 8\)"):
        begin(plan_of(images, resolution=8), store)
    assert contents(tmp_path / "out") == before


def test_an_unfinished_set_of_other_settings_and_other_files_are_refused(
    images: Path, tmp_path: Path
) -> None:
    begin(plan_of(images), open_storage(tmp_path / "out"))
    with pytest.raises(ShardError, match="unfinished set of other settings"):
        begin(plan_of(images, flips=True), open_storage(tmp_path / "out"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    with pytest.raises(ShardError, match=r"not empty: it holds thesis\.tex"):
        begin(plan_of(images), open_storage(tmp_path / "home"))
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_flips_are_made_before_the_encoder(images: Path, tmp_path: Path) -> None:
    info = prepare_locally(plan_of(images, True, flips=True), open_storage(tmp_path / "out"), Blocks())
    assert info.samples == 2 * IMAGES
    with ShardLoader(tmp_path / "out", 2 * IMAGES, posterior="mean", threads=0) as loader:
        batch = next(loader)
    flat = batch.x0.flatten(1)
    mirrored = batch.x0.flip(3).flatten(1)
    # Block averages commute with mirroring, so every latent has its mirror image in the set.
    nearest = torch.cdist(flat, mirrored).min(1).values
    assert nearest.max() < 1e-3
    keys = {row["key"] for row in read_index(tmp_path / "out").to_pylist()}
    assert keys == {f"{i:08d}{end}" for i in range(IMAGES) for end in ("", "-flip")}


def test_latents_keep_mean_and_deviation_as_the_encoder_gave_them(images: Path, tmp_path: Path) -> None:
    info = prepare_locally(plan_of(images, True), open_storage(tmp_path / "out"), Blocks())
    assert (info.kind, info.dtype, info.shape, info.scaling) == ("latents", "float16", (3, 4, 4), 0.5)
    with ShardLoader(tmp_path / "out", IMAGES, posterior="moments", threads=0) as loader:
        mean, std = next(loader).x0.chunk(2, 1)
    assert (std == 0.125).all()
    plan = plan_of(images, True)
    pixels = torch.stack([torch.from_numpy(plan.pixels(i)).float() / 127.5 - 1 for i in range(IMAGES)])
    expected = torch.nn.functional.avg_pool2d(pixels, 4)
    nearest = torch.cdist(mean.flatten(1), expected.flatten(1)).min(1).values
    assert nearest.max() < 2e-2  # float16


def test_damaged_images_are_all_named_and_stop_the_set(images: Path, tmp_path: Path) -> None:
    for name in ("class0/000.png", "class3/003.png", "class1/021.png"):
        (images / name).write_bytes((images / name).read_bytes()[:60])
    store = open_storage(tmp_path / "out")
    plan = plan_of(images)
    begin(plan, store)
    named = [name for shard in range(plan.shards) for name in damaged_in(plan, shard, store)]
    assert sorted(name.split(":")[0] for name in named) == [
        "class0/000.png",
        "class1/021.png",
        "class3/003.png",
    ]
    with pytest.raises(ShardError, match="no shard set"):
        read_info(tmp_path / "out")


def test_a_shard_that_fails_takes_back_the_images_it_counted(images: Path, tmp_path: Path) -> None:
    plan, store = plan_of(images), open_storage(tmp_path / "out")
    begin(plan, store)
    damaged = plan.source.item_name(plan.place(plan.shard_samples(3)[-1])[0])
    (images / damaged).write_bytes(b"")
    counted: list[int] = []
    with pytest.raises(DamagedImages, match=damaged):
        ShardBuilder(plan, store, on_images=counted.append).build(3)
    assert counted == [4, 1, -5]
    assert not (tmp_path / "out" / "shard-000003.tar").exists()


def test_a_shard_says_which_of_its_images_were_left_out(images: Path, tmp_path: Path) -> None:
    (images / "class2/006.png").write_bytes(b"")
    plan, store = plan_of(images, skip_damaged=True), open_storage(tmp_path / "out")
    begin(plan, store)
    built = [ShardBuilder(plan, store).build(shard) for shard in range(plan.shards)]
    named = [name for shard in built for name in shard.left_out]
    assert [name.split(":")[0] for name in named] == ["class2/006.png"]
    for shard, one in enumerate(built):
        assert one.record.samples + len(one.left_out) == len(plan.shard_samples(shard))


def test_damaged_images_can_be_left_out_by_name(images: Path, tmp_path: Path) -> None:
    (images / "class2/006.png").write_bytes(b"")
    info = prepare_locally(plan_of(images, skip_damaged=True), open_storage(tmp_path / "out"), None)
    assert info.samples == IMAGES - 1
    assert [name.split(":")[0] for name in info.left_out] == ["class2/006.png"]
    assert verify(tmp_path / "out") == []


def test_parquet_is_dealt_by_row_groups_so_that_each_is_read_once(tmp_path: Path) -> None:
    def png(value: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, format="PNG")
        return buffer.getvalue()

    table = pa.table({"image": [png(i) for i in range(40)], "label": [i % 2 for i in range(40)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=5)
    plan = ShardPlan(open_source(str(tmp_path / "x.parquet")), PrepareSettings(8))
    items = [plan.place(number)[0] for number in range(40)]
    assert sorted(items) == list(range(40))
    groups = [item // 5 for item in items]
    assert sum(a != b for a, b in pairwise(groups)) == 7
    assert groups != sorted(groups)


def test_a_second_preparation_of_the_same_place_is_kept_out(tmp_path: Path) -> None:
    store = open_storage(tmp_path / "out")
    with exclusive(store), pytest.raises(ShardError, match="another process"), exclusive(store):
        pass


def test_a_resolution_that_the_autoencoder_cannot_halve_is_refused(images: Path) -> None:
    with pytest.raises(PreparationError, match="18 is no multiple of 4"):
        plan_of(images, True, resolution=18)


def test_finishing_before_all_shards_are_there_publishes_nothing(images: Path, tmp_path: Path) -> None:
    plan, store = plan_of(images), open_storage(tmp_path / "out")
    begin(plan, store)
    ShardBuilder(plan, store).build(0)
    with pytest.raises(StorageError, match="shard-000001"):
        finish(plan, store)
    assert not (tmp_path / "out" / "dataset.json").exists()
