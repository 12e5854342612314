"""Shard sets from elsewhere: each value of a sidecar that cannot be right is refused in a sentence, before anything is made of it."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soflow_core.failures import InputError
from soflow_pipelines.shards.cache import ShardCache
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import INDEX_SCHEMA, MANIFEST_SCHEMA, read_info
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.shards.writer import Sample, write_shards

SAMPLES = 30


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside") / "set"
    info = DatasetInfo(kind="pixels", shape=(1, 8, 8), dtype="uint8", classes=7, class_names=tuple("abcdefg"))
    rng = np.random.default_rng(0)
    samples = [
        Sample(f"k{i:02d}", rng.integers(0, 256, (1, 8, 8)).astype(np.uint8), i % 7) for i in range(SAMPLES)
    ]
    write_shards(samples, folder, info, per_shard=10)
    return folder


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "set"))


def read_all(folder: str | Path, **settings: Any) -> None:
    with ShardLoader(folder, SAMPLES, threads=0, **settings) as loader:
        next(loader)


def describe(folder: Path, **fields: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_rows(path: Path, change: Callable[[list[dict[str, Any]]], Any], schema: pa.Schema) -> None:
    rows = pq.read_table(path).to_pylist()
    changed = change(rows)
    pq.write_table(pa.Table.from_pylist(rows if changed is None else changed, schema=schema), path)


IMPOSSIBLE: dict[str, list[Any]] = {
    "classes": [0, -1, 10**9, 10**12, 10**30, "10", [1], 1.5, True],
    "shape": [
        [1.0, 8.0, 8.0],
        [10**9, 8, 8],
        [10**5, 10**5, 10],
        [10**9] * 3,
        [0, 8, 8],
        [1, 8],
        "188",
        None,
    ],
    "samples": ["x", None, -1, 1.5, True, 10**30],
    "bytes": ["many", None, -1],
    "shards": [None, "3", -2, 10**12],
    "left_out": [5, "abc", [1], None],
    "class_names": ["abcdefg", [None] * 7, [["x"]] * 7, ["a"], None],
    "recipe": [5, "x", None, []],
    "flips": ["x", 1, None],
    "resolution": ["x", 0, -8, 1.5],
    "autoencoder": [5, ["x"]],
    "scaling": [float("nan"), float("inf"), 0, "1", None, 10**400],
    "shift": [float("-inf"), "0", True],
    "dtype": ["float64", 5, None, ["uint8"]],
    "kind": ["images", None, {}],
    "writer_version": ["1", None, 1.5],
    "digest": [None, 5, "", "sha256:zz", "md5:" + "0" * 64, "sha256:" + "A" * 64],
    "crop": [7],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, v) for name, values in IMPOSSIBLE.items() for v in values]
)
def test_an_impossible_field_is_refused_by_its_name(folder: Path, name: str, value: Any) -> None:
    describe(folder, classes=None, class_names=[]) if name == "classes" else None
    describe(folder, **{name: value})
    tracemalloc.start()
    with pytest.raises(ShardError, match=r"dataset\.json cannot be understood: .*" + name.split("_")[0]):
        read_info(folder)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    for read in (verify, read_all):
        with pytest.raises(ShardError):
            read(folder)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "{}", "null", "\x00", "{" + "9" * 5000, '"x"', ""]
)
def test_a_text_that_is_no_description_is_refused(folder: Path, text: str) -> None:
    (folder / "dataset.json").write_text(text)
    with pytest.raises(ShardError, match=r"dataset\.json cannot be understood"):
        read_info(folder)


def test_a_description_of_endless_bytes_is_not_read_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soflow_pipelines.shards.tables.MOST_BYTES", {"dataset.json": 2**20})
    with (folder / "dataset.json").open("r+b") as file:
        file.truncate(50 * 2**30)
    with pytest.raises(ShardError, match="more than 1048576 bytes"):
        read_info(folder)


MANIFEST_ROWS: list[dict[str, Any]] = [
    {"shard": "../outside/evil.tar"},
    {"shard": "/etc/passwd"},
    {"shard": "a\x00b"},
    {"shard": "a" * 5000},
    {"shard": ".."},
    {"shard": ".hidden"},
    {"shard": "\x1b]0;title\x07\x1b[2Jx.tar"},
    {"shard": "shard-000001.tar"},
    {"shard": ""},
    {"shard": None},
    {"sha256": "../../victim/notes"},
    {"sha256": "/any/dir/name"},
    {"sha256": "victim/private"},
    {"sha256": "A" * 64},
    {"sha256": "0" * 63},
    {"sha256": "0" * 64 + "\n"},
    {"sha256": None},
    {"samples": None},
    {"samples": -1},
    {"samples": 2**61},
    {"samples": "ten"},
    {"bytes": None},
    {"bytes": -1},
    {"bytes": "many"},
    {"bytes": 0},
    {"label_counts": None},
    {"label_counts": [(-1, 10)]},
    {"label_counts": [(2_000_000_000, 10)]},
    {"label_counts": [(0, -3)]},
    {"label_counts": [(0, None)]},
    {"label_counts": [(0, 10**15)]},
]


def change_manifest(folder: Path, fields: dict[str, Any]) -> None:
    path = folder / "manifest.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0].update(fields)
    schema = MANIFEST_SCHEMA
    for name, value in fields.items():
        if isinstance(value, str) and name in ("samples", "bytes"):
            schema = schema.set(schema.get_field_index(name), pa.field(name, pa.string()))
            for row in rows:
                row[name] = str(row[name])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


@pytest.mark.parametrize("fields", MANIFEST_ROWS, ids=lambda fields: ascii(fields)[:60])
def test_an_impossible_row_of_the_manifest_is_refused(folder: Path, fields: dict[str, Any]) -> None:
    change_manifest(folder, fields)
    # Training does not read the counts of labels.
    for read in (verify,) if "label_counts" in fields else (verify, read_all):
        with pytest.raises(ShardError, match=r"manifest\.parquet cannot be understood: ") as refused:
            read(folder)
        assert str(refused.value).isprintable()


INDEX_ROWS: list[dict[str, Any]] = [
    {"shard": -1},
    {"shard": 3},
    {"shard": 2**31 - 1},
    {"shard": 2},
    {"offset": -512},
    {"offset": 0},
    {"offset": 513},
    {"offset": 2**62},
    {"offset": 1536},
    {"bytes": 0},
    {"bytes": -1},
    {"bytes": 2**31 - 1},
    {"label": 7},
    {"label": 99},
    {"label": -1},
    {"label": -5},
    {"label": 2**31 - 1},
]


@pytest.mark.parametrize("fields", INDEX_ROWS, ids=str)
def test_what_verification_passes_is_what_training_can_use(folder: Path, fields: dict[str, Any]) -> None:
    change_rows(folder / "index.parquet", lambda rows: rows[0].update(fields), INDEX_SCHEMA)
    assert any("sample k00" in str(damage) for damage in verify(folder))
    with pytest.raises(ShardError, match="sample k0"):
        read_all(folder)


@pytest.mark.parametrize("name", INDEX_SCHEMA.names)
def test_a_null_in_the_index_is_refused(folder: Path, name: str) -> None:
    change_rows(folder / "index.parquet", lambda rows: rows[3].update({name: None}), INDEX_SCHEMA)
    with pytest.raises(
        ShardError, match=rf"index\.parquet cannot be understood: {name} is missing in 1 rows"
    ):
        verify(folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("shard", pa.string()),
        ("offset", pa.float64()),
        ("label", pa.list_(pa.int32())),
        ("key", pa.int64()),
        ("crc32", pa.int64()),
    ],
)
def test_a_column_of_another_type_is_refused(folder: Path, name: str, kind: pa.DataType) -> None:
    path = folder / "index.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, pa.field(name, kind), pa.nulls(len(table), kind)), path)
    # Training reads no keys.
    for read in (verify,) if name == "key" else (verify, read_all):
        with pytest.raises(ShardError, match=f"{name} is .*, it must be") as refused:
            read(folder)
        assert "index.parquet cannot be understood" in str(refused.value)


@pytest.mark.parametrize(("table", "name"), [("manifest.parquet", "sha256"), ("index.parquet", "key")])
def test_a_column_of_another_name_is_refused(folder: Path, table: str, name: str) -> None:
    content = pq.read_table(folder / table)
    renamed = ["other" if column == name else column for column in content.column_names]
    pq.write_table(content.rename_columns(renamed), folder / table)
    with pytest.raises(
        ShardError, match=rf"{table} cannot be understood: it has the columns .*, and not one {name}"
    ):
        verify(folder)


def test_rows_of_the_index_in_another_order_are_found(folder: Path) -> None:
    change_rows(folder / "index.parquet", lambda rows: rows[::-1], INDEX_SCHEMA)
    assert any("not in the order of the shards" in str(damage) for damage in verify(folder))
    with pytest.raises(ShardError, match="not in the order of the shards"):
        read_all(folder)


def test_rows_of_one_shard_in_another_order_are_found(folder: Path) -> None:
    change_rows(folder / "index.parquet", lambda rows: rows[1::-1] + rows[2:], INDEX_SCHEMA)
    assert any("not in the order of the samples" in str(damage) for damage in verify(folder))
    with pytest.raises(ShardError, match="not in the order of the samples"):
        read_all(folder)


def test_escapes_in_keys_reach_no_terminal(folder: Path) -> None:
    change_rows(
        folder / "index.parquet", lambda rows: rows[0].update(key="\x1b]0;x\x07", label=99), INDEX_SCHEMA
    )
    assert all(str(damage).isprintable() for damage in verify(folder))
    with pytest.raises(ShardError, match=r"sample \\x1b\]0;x\\x07") as refused:
        read_all(folder)
    assert str(refused.value).isprintable()


def test_a_small_table_that_unpacks_to_many_rows_is_not_read(folder: Path) -> None:
    count = 5_000_000
    columns = [
        pa.array(np.zeros(count, field.type.to_pandas_dtype()), field.type)
        for field in INDEX_SCHEMA
        if field.name != "key"
    ]
    columns.insert(1, pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["k"]))
    pq.write_table(pa.table(columns, names=INDEX_SCHEMA.names), folder / "index.parquet", compression="zstd")
    assert (folder / "index.parquet").stat().st_size < 2**20
    with pytest.raises(ShardError, match="unpack to 5000000 rows"):
        verify(folder)


def test_a_short_table_of_long_texts_is_not_unpacked(folder: Path) -> None:
    rows = pq.read_table(folder / "index.parquet")
    count = 500_000
    columns = {
        column.name: pa.array(np.resize(rows[column.name].to_numpy(), count), column.type)
        for column in rows.schema
    }
    columns["key"] = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), ["k" * 10_000])
    table = pa.table(columns)
    pq.write_table(table, folder / "index.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    started = time.monotonic()
    with pytest.raises(ShardError, match="of 10000 bytes is too long"):
        verify(folder)
    assert time.monotonic() - started < 5
    assert pa.total_allocated_bytes() - before < 2**26


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test reads what the product prints."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = partial(SilentHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("target", ["../../victim/notes", "{tmp}/victim/notes", "../victim/private"])
def test_a_remote_manifest_touches_no_file_outside_the_cache(
    folder: Path, tmp_path: Path, server: str, target: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("notes.part", "notes.tar", "private.tar"):
        (victim / name).write_bytes(b"mine")
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in victim.iterdir()}
    change_manifest(folder, {"sha256": target.format(tmp=tmp_path)})
    cache = ShardCache(tmp_path / "cache" / "shards", 10**9)
    with pytest.raises(ShardError, match="is not 64 hexadecimal digits"):
        read_all(f"{server}/set", cache=cache)
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in victim.iterdir()} == before
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_one_sentence(
    folder: Path, tmp_path: Path, server: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="cannot be opened"):
        read_all(f"{server}/{folder.name}", cache=ShardCache(tmp_path / "taken" / "cache", 10**9))
    assert capfd.readouterr().err == ""


def test_a_name_that_is_not_utf8_comes_back_exactly(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    info = DatasetInfo("pixels", (1, 4, 4), "uint8", 2, (name, 'q"\\\n'), left_out=(f"{name}/1.png",))
    samples = [Sample(f"{i}", np.zeros((1, 4, 4), np.uint8), i) for i in range(2)]
    write_shards(samples, tmp_path / "set", info)
    assert (tmp_path / "set" / "dataset.json").read_bytes().isascii()
    again = read_info(tmp_path / "set")
    assert (again.class_names, again.left_out) == (info.class_names, info.left_out)
