"""Verification: each kind of damage is found and named, and an intact set has none."""

import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.tables import read_index
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.shards.writer import Sample, write_shards

SHARD = "shard-000001.tar"
HEADER = 512


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "set"
    info = DatasetInfo(kind="latents", shape=(2, 8, 8), dtype="float16", classes=7)
    rng = np.random.default_rng(0)
    samples = [Sample(f"k{i:02d}", rng.random((4, 8, 8)).astype(np.float16), i % 7) for i in range(30)]
    write_shards(samples, folder, info, per_shard=10)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "set"))


def row(folder: Path, key: str) -> dict[str, int]:
    return next(row for row in read_index(folder).to_pylist() if row["key"] == key)


def edit(folder: Path, change: Callable[[bytearray], bytearray | None]) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    (folder / SHARD).write_bytes(change(content) or content)


def damages_of(folder: Path) -> list[str]:
    return [str(damage) for damage in verify(folder, threads=2)]


def test_a_set_as_it_was_written_has_no_damage(intact: Path) -> None:
    assert verify(intact) == []


def test_a_cut_in_data_names_the_sample_and_all_that_are_lost(folder: Path) -> None:
    offset = row(folder, "k15")["offset"]
    edit(folder, lambda content: content[: offset + 100])
    found = damages_of(folder)
    assert f"{SHARD}, sample k15: cut inside its data" in found
    for lost in ("k16", "k17", "k18", "k19"):
        assert f"{SHARD}, sample {lost}: the .npy is missing" in found
    assert not [line for line in found if "k14" in line]
    assert re.search(rf"{SHARD}: \d+ bytes instead of \d+", "\n".join(found))


def test_a_cut_in_a_header_is_found(folder: Path) -> None:
    offset = row(folder, "k15")["offset"]
    edit(folder, lambda content: content[: offset - 200])
    found = damages_of(folder)
    assert f"{SHARD}, sample k14: cut in the header after it" in found
    assert f"{SHARD}, sample k15: the .npy is missing" in found
    assert f"{SHARD}, sample k15: the .cls is missing" in found


def test_a_cut_at_a_members_edge_is_found(folder: Path) -> None:
    """Where tar readers end silently: after the .npy, before the header of its .cls."""
    size = row(folder, "k15")["bytes"]
    edge = row(folder, "k15")["offset"] + size + -size % 512
    edit(folder, lambda content: content[:edge])
    found = damages_of(folder)
    assert f"{SHARD}, sample k15: the shard ends after it, without an end mark" in found
    assert f"{SHARD}, sample k15: the .cls is missing" in found
    assert f"{SHARD}, sample k15: the .npy is missing" not in found


def test_a_flipped_bit_is_found_in_data_and_in_a_label(folder: Path) -> None:
    place = row(folder, "k12")
    size = place["bytes"]
    label_at = place["offset"] + size + -size % 512 + HEADER

    def flip(content: bytearray) -> None:
        content[place["offset"] + size - 7] ^= 0x10
        content[label_at] ^= 1

    edit(folder, flip)
    found = damages_of(folder)
    assert f"{SHARD}, sample k12: its bytes are not those that were written (CRC-32 differs)" in found
    assert any(line.startswith(f"{SHARD}, sample k12: its label is") for line in found)
    assert len(found) == 2


def test_a_flipped_bit_in_a_header_loses_one_member_alone(folder: Path) -> None:
    place = row(folder, "k12")["offset"] - HEADER

    def flip(content: bytearray) -> None:
        content[place + 130] ^= 1

    edit(folder, flip)
    found = damages_of(folder)
    assert any("k11: a damaged header after it" in line for line in found)
    assert f"{SHARD}, sample k12: the .npy is missing" in found
    assert not [line for line in found if "k13" in line]


def test_a_flipped_bit_in_the_padding_is_found(folder: Path) -> None:
    size = row(folder, "k12")["bytes"]
    place = row(folder, "k12")["offset"] + size + 10
    assert size % 512

    def flip(content: bytearray) -> None:
        content[place] ^= 1

    edit(folder, flip)
    assert damages_of(folder) == [f"{SHARD}: bytes between the samples differ (SHA-256)"]


def test_a_missing_member_is_found_where_the_tar_is_otherwise_sound(folder: Path) -> None:
    source = folder / SHARD
    with tarfile.open(source) as old, tarfile.open(folder / "new.tar", "w") as new:
        for member in old:
            if member.name != "k13.cls":
                new.addfile(member, old.extractfile(member))
    (folder / "new.tar").replace(source)
    found = damages_of(folder)
    assert f"{SHARD}, sample k13: the .cls is missing" in found
    assert not any("k12" in line for line in found)


def test_a_sample_that_was_not_written_is_found(folder: Path) -> None:
    def append(content: bytearray) -> bytearray:
        member = tarfile.TarInfo("k99.cls")
        member.size = 1
        return content[:-1024] + member.tobuf(tarfile.USTAR_FORMAT) + b"5".ljust(512, b"\0") + content[-1024:]

    edit(folder, append)
    assert any("sample k99: a member k99.cls that was not written" in line for line in damages_of(folder))


@pytest.mark.timeout(60)
def test_a_member_of_less_than_no_bytes_does_not_lead_back_to_itself(folder: Path) -> None:
    def insert(content: bytearray) -> bytearray:
        member = tarfile.TarInfo("k99.cls")
        member.size = -1024
        return content[:-1024] + member.tobuf(tarfile.GNU_FORMAT) + content[-1024:]

    edit(folder, insert)
    assert any("sample k19: a damaged header after it" in line for line in damages_of(folder))


def test_a_wrong_count_is_found_in_each_table(folder: Path) -> None:
    index = pq.read_table(folder / "index.parquet")
    pq.write_table(index.slice(0, 29), folder / "index.parquet")
    assert any(
        "index.parquet: counts 29 samples, dataset.json says 30" in line for line in damages_of(folder)
    )
    pq.write_table(index, folder / "index.parquet")
    manifest = pq.read_table(folder / "manifest.parquet")
    column = manifest["samples"].to_pylist()
    column[1] += 1
    changed = manifest.set_column(1, manifest.schema.field(1), pa.array(column))
    pq.write_table(changed, folder / "manifest.parquet")
    found = damages_of(folder)
    assert "manifest.parquet: counts 31 samples, dataset.json says 30" in found
    assert f"{SHARD}: manifest.parquet counts 11 samples, index.parquet 10" in found


def test_an_extra_file_and_a_missing_shard_are_found(folder: Path) -> None:
    (folder / "shard-000003.tar").write_bytes(b"")
    (folder / "shard-000002.tar").unlink()
    found = damages_of(folder)
    assert "shard-000003.tar: an extra file" in found
    assert "shard-000002.tar: the shard is missing" in found
    assert len(found) == 2


def test_shards_that_were_swapped_are_found(folder: Path) -> None:
    (folder / "shard-000000.tar").rename(folder / "aside")
    (folder / SHARD).rename(folder / "shard-000000.tar")
    (folder / "aside").rename(folder / SHARD)
    found = damages_of(folder)
    assert any(line.startswith("shard-000000.tar, sample k00: the .npy is missing") for line in found)
    assert any("a member k10.npy that was not written" in line for line in found)


def test_a_changed_checksum_is_found(folder: Path) -> None:
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(re.sub(r"sha256:.{8}", "sha256:01234567", text))
    assert any("its checksums are not those of the digest" in line for line in damages_of(folder))


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no shard set"):
        verify(tmp_path)
