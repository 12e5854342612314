"""Shard sets: their files, equal bytes for equal input, and reading them with the WebDataset library."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.shards.info import DataMismatch, DatasetInfo, ShardError
from soflow_pipelines.shards.tables import read_index, read_info, read_manifest
from soflow_pipelines.shards.writer import Sample, samples_per_shard, write_shards
from soflow_pipelines.sources.digits import load_digits
from tests.support.fork_server import fork_server

PIXELS = DatasetInfo(kind="pixels", shape=(1, 2, 2), dtype="uint8", classes=3)


def pixel_samples(count: int) -> list[Sample]:
    return [Sample(f"{i:04d}", np.full((1, 2, 2), i % 256, np.uint8), i % 3) for i in range(count)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_builtin("digits", tmp_path_factory.mktemp("data") / "digits")


def test_a_webdataset_reader_sees_every_digit_with_its_label(digits: Path) -> None:
    urls = [str(digits / record.name) for record in read_manifest(digits)]
    seen = {
        s["__key__"]: (s["npy"], s["cls"]) for s in webdataset.WebDataset(urls, shardshuffle=False).decode()
    }
    data = load_digits()
    assert len(seen) == len(data.labels) == 1797
    for number, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        stored, stored_label = seen[f"{number:08d}"]
        assert stored_label == label
        np.testing.assert_array_equal(stored, image)


def test_the_manifest_holds_checksums_and_label_counts_of_the_files(digits: Path) -> None:
    records = read_manifest(digits)
    info = read_info(digits)
    for record in records:
        content = (digits / record.name).read_bytes()
        assert record.sha256 == hashlib.sha256(content).hexdigest()
        assert record.bytes == len(content)
        assert sum(record.label_counts.values()) == record.samples
    totals = np.zeros(10, int)
    for record in records:
        for label, count in record.label_counts.items():
            totals[label] += count
    np.testing.assert_array_equal(totals, np.bincount(load_digits().labels))
    assert info.samples == sum(record.samples for record in records) == 1797
    assert info.shards == len(records)


def test_an_offset_of_the_index_leads_to_the_array(digits: Path) -> None:
    index = read_index(digits).to_pylist()
    data = load_digits()
    for row in (index[0], index[777], index[-1]):
        content = (digits / f"shard-{row['shard']:06d}.tar").read_bytes()
        array = np.load(io.BytesIO(content[row["offset"] : row["offset"] + row["bytes"]]))
        np.testing.assert_array_equal(array, data.images[int(row["key"])])


def test_equal_samples_make_equal_bytes(tmp_path: Path) -> None:
    first = write_shards(pixel_samples(20), tmp_path / "a", PIXELS, per_shard=6)
    second = write_shards(pixel_samples(20), tmp_path / "b", PIXELS, per_shard=6)
    assert first == second
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert [n for n in names if n.endswith(".tar")] == [f"shard-{i:06d}.tar" for i in range(4)]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    changed = pixel_samples(20)
    changed[7] = Sample(changed[7].key, changed[7].array + 1, changed[7].label)
    first = write_shards(pixel_samples(20), tmp_path / "a", PIXELS)
    second = write_shards(changed, tmp_path / "b", PIXELS)
    assert first.digest.startswith("sha256:")
    assert first.digest != second.digest


def test_tar_members_carry_no_time_and_no_owner(tmp_path: Path) -> None:
    write_shards(pixel_samples(3), tmp_path / "a", PIXELS)
    with tarfile.open(tmp_path / "a" / "shard-000000.tar") as archive:
        members = archive.getmembers()
    assert [m.name for m in members] == [
        "0000.npy",
        "0000.cls",
        "0001.npy",
        "0001.cls",
        "0002.npy",
        "0002.cls",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.b", np.zeros((1, 2, 2), np.uint8), 0), "no dot"),
        (Sample("0000", np.zeros((1, 2, 2), np.uint8), 0), "comes twice"),
        (Sample("x", np.zeros((1, 2, 3), np.uint8), 0), r"\(1, 2, 3\)"),
        (Sample("x", np.zeros((1, 2, 2), np.float32), 0), "float32"),
        (Sample("x", np.zeros((1, 2, 2), np.uint8), 3), "label 3"),
        (Sample("x", np.zeros((1, 2, 2), np.uint8), None), "label None"),
    ],
)
def test_a_sample_that_does_not_belong_is_refused_and_nothing_is_published(
    tmp_path: Path, sample: Sample, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shards([*pixel_samples(2), sample], tmp_path / "a", PIXELS)
    assert not list((tmp_path / "a").glob("*"))
    with pytest.raises(ShardError, match="no shard set"):
        read_info(tmp_path / "a")


def test_a_set_is_not_written_over_another(tmp_path: Path) -> None:
    write_shards(pixel_samples(3), tmp_path / "a", PIXELS)
    with pytest.raises(ShardError, match="already holds"):
        write_shards(pixel_samples(3), tmp_path / "a", PIXELS)


def test_shards_are_about_256_megabytes_and_a_small_set_has_eight() -> None:
    latents = DatasetInfo(kind="latents", shape=(4, 32, 32), dtype="float16", classes=1000)
    many = samples_per_shard(latents, 1_281_167)
    assert 0.95 * 256 * 2**20 < many * 18_432 <= 256 * 2**20
    assert samples_per_shard(latents, 200) == 25


def test_data_that_fits_is_accepted_and_a_misfit_names_both_sides() -> None:
    latents = DatasetInfo(
        kind="latents",
        shape=(4, 32, 32),
        dtype="float16",
        classes=1000,
        autoencoder="sd-vae-ft-mse",
        scaling=0.18215,
    )
    latents.check_fits((4, 32, 32), classes=1000, autoencoder="sd-vae-ft-mse", scaling=0.18215)
    latents.check_fits((4, 32, 32), classes=None)
    misfits = [
        ({"shape": (3, 32, 32)}, "4 x 32 x 32.*3 x 32 x 32"),
        ({"shape": (4, 32, 32), "classes": 10}, "1000 classes.*10 classes"),
        ({"shape": (4, 32, 32), "autoencoder": "kl-f8-mini"}, "sd-vae-ft-mse.*kl-f8-mini"),
        ({"shape": (4, 32, 32), "scaling": 0.13}, "0.18215.*0.13"),
    ]
    for settings, message in misfits:
        with pytest.raises(DataMismatch, match=message):
            latents.check_fits(**settings)


def _build(folder: Path) -> str:
    return read_info(ensure_builtin("digits", folder)).digest


def test_processes_that_build_the_digits_at_once_agree_on_one_complete_set(tmp_path: Path) -> None:
    folder = tmp_path / "nested" / "digits"
    with fork_server().Pool(2) as pool:
        digests = pool.map(_build, [folder] * 4)
    assert len(set(digests)) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_an_unknown_builtin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no built-in data set 'letters'; there is digits"):
        ensure_builtin("letters", tmp_path / "letters")
