"""Sets of many shards and samples: bounded memory and mappings, the same samples and the same refusals."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from soflow_pipelines.shards import index_checks, reader
from soflow_pipelines.shards.index_checks import row_defects
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import read_index, read_info, read_manifest
from soflow_pipelines.shards.writer import Sample, write_shards

INFO = DatasetInfo(kind="pixels", shape=(1, 4, 4), dtype="uint8", classes=5)
SAMPLES, SHARDS = 60, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "set"
    rng = np.random.default_rng(0)
    write_shards(
        (Sample(f"{n:04d}", rng.integers(0, 256, (1, 4, 4)).astype(np.uint8), n % 5) for n in range(SAMPLES)),
        folder,
        INFO,
        per_shard=SAMPLES // SHARDS,
    )
    return folder


def batches(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    with ShardLoader(folder, 16, threads=1) as loader:
        return [(batch.x0, batch.labels) for batch in islice(loader, 8)]  # type: ignore[misc]


def test_more_shards_than_may_be_mapped_give_the_same_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = batches(folder)
    monkeypatch.setattr(reader, "MOST_MAPPED", 3)
    found = batches(folder)
    assert all(
        torch.equal(a, b) for pair in zip(whole, found, strict=True) for a, b in zip(*pair, strict=True)
    )
    assert {label.dtype for _, label in found} == {torch.int64}
    with ShardLoader(folder, 16, threads=0) as loader:
        next(loader)
        assert len(loader._samples._maps) == 3


@pytest.mark.parametrize(("damage", "message"), [("gone", "is missing"), ("cut", "has 512 bytes")])
def test_shards_that_are_not_all_mapped_are_looked_at_before_training(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    last = tmp_path / read_manifest(tmp_path)[-1].name
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(last.read_bytes()[:512])
    monkeypatch.setattr(reader, "MOST_MAPPED", 3)
    with pytest.raises(ShardError, match=rf"{last.name} {message}"):
        ShardLoader(tmp_path, 16)


def test_a_sample_takes_at_most_16_bytes(folder: Path) -> None:
    with ShardLoader(folder, 16, threads=0) as loader:
        samples = loader._samples
        each = [samples.labels, samples._block, samples._crc, samples._checked]
        assert sum(array.nbytes for array in each) / SAMPLES <= 16
        by_sample = [value for value in vars(samples).values() if isinstance(value, np.ndarray)]
        assert sum(array.nbytes for array in by_sample if len(array) >= SAMPLES) / SAMPLES <= 16


def test_a_manifest_is_read_without_the_counts_of_labels(folder: Path) -> None:
    whole, bare = read_manifest(folder), read_manifest(folder, label_counts=False)
    assert [(each.name, each.samples, each.bytes, each.sha256) for each in whole] == [
        (each.name, each.samples, each.bytes, each.sha256) for each in bare
    ]
    assert (sum(whole[0].label_counts.values()), bare[0].label_counts) == (5, {})


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        ("shard", 30, 99),
        ("shard", 30, 0),
        ("offset", 31, 512),
        ("bytes", 59, 1),
        ("label", 8, 7),
        ("offset", 8, 3),
    ],
)
def test_rows_are_checked_some_at_a_time_as_all_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, column: str, row: int, value: int
) -> None:
    info, records, index = read_info(folder), read_manifest(folder), read_index(folder)
    assert list(row_defects(info, records, index)) == []
    values = index[column].to_pylist()
    values[row] = value
    place = index.schema.get_field_index(column)
    damaged = index.set_column(
        place, index.schema.field(place), pa.array(values, index.schema.field(place).type)
    )
    whole = sorted(row_defects(info, records, damaged))
    assert whole
    for count in (1, 7, 30):
        monkeypatch.setattr(index_checks, "ROWS_AT_ONCE", count)
        assert list(row_defects(info, records, index)) == []
        assert sorted(row_defects(info, records, damaged)) == whole


@pytest.mark.parametrize("rows_of_a_part", [1, 7, 1000])
def test_an_index_is_read_part_by_part(folder: Path, tmp_path: Path, rows_of_a_part: int) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = read_index(folder)
    pq.write_table(index, tmp_path / "index.parquet", row_group_size=rows_of_a_part)
    assert read_index(tmp_path).equals(index)
    with ShardLoader(folder, 16, threads=0) as whole, ShardLoader(tmp_path, 16, threads=0) as parts:
        for name in ("labels", "_block", "_crc"):
            np.testing.assert_array_equal(getattr(parts._samples, name), getattr(whole._samples, name))
        np.testing.assert_array_equal(next(parts).x0, next(whole).x0)
    offsets = index["offset"].to_pylist()
    offsets[59] += 1
    damaged = index.set_column(3, "offset", pa.array(offsets, pa.int64()))
    pq.write_table(damaged, tmp_path / "index.parquet", row_group_size=rows_of_a_part)
    key, last = index["key"][59].as_py(), read_manifest(folder)[index["shard"][59].as_py()].name
    with pytest.raises(
        ShardError, match=rf"{last}, sample {key}: index.parquet puts it at byte {offsets[59]}"
    ):
        ShardLoader(tmp_path, 16)
