"""Random damage to what comes from outside: refused as input, or read; no other exception, and no time or memory without bound."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from PIL import Image

from soflow_pipelines.images.decode import FORMATS, ImageError, centre_crop, decode_image
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.verify import verify
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.opening import open_storage
from tests.support.fuzz import AMOUNTS, EDITS, FEW, JSON, Edit, edited, examples, refused_or_read


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_builtin("digits", tmp_path_factory.mktemp("fuzz") / "digits")


def read_batch(folder: Path) -> None:
    with ShardLoader(folder, 64, threads=0) as loader:
        next(loader)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_value_of_a_field_of_the_description(digits: Path, amount: int) -> None:
    content = json.loads((digits / "dataset.json").read_text())

    @examples(amount, st.sampled_from(sorted(content)), JSON)
    def check(name: str, value: Any) -> None:
        text = json.dumps({**content, name: value})
        try:
            info = DatasetInfo.from_json(text)
        except ValueError:
            return
        assert DatasetInfo.from_json(info.to_json()) == info

    check()


@pytest.mark.parametrize("name", ["dataset.json", "manifest.parquet", "index.parquet", "shard-000000.tar"])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_damage_to_a_file_of_a_shard_set(digits: Path, name: str, amount: int) -> None:
    with tempfile.TemporaryDirectory() as base:
        folder = Path(shutil.copytree(digits, Path(base) / "set"))
        content = (folder / name).read_bytes()

        @examples(amount, EDITS)
        def check(edits: list[Edit]) -> None:
            (folder / name).write_bytes(edited(content, edits))
            refused_or_read(lambda: read_batch(folder))
            if amount > FEW:
                refused_or_read(lambda: verify(folder, threads=1))

        check()


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_damage_to_an_image(kind: str, amount: int) -> None:
    content = encoded(kind)

    @examples(amount, EDITS)
    def check(edits: list[Edit]) -> None:
        try:
            assert centre_crop(decode_image(edited(content, edits), "x"), 8).size == (8, 8)
        except ImageError as error:
            assert str(error).startswith("x: ")  # noqa: PT017

    check()


def tar_of_images() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(3):
            for ending, content in (
                ("png", encoded("PNG")),
                ("cls", str(number).encode()),
                ("json", b'{"label": 1}'),
            ):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def zip_of_images() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"class{number}/{number}.png", encoded("PNG"))
    return buffer.getvalue()


@pytest.mark.parametrize(("ending", "make"), [(".tar", tar_of_images), (".zip", zip_of_images)])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_damage_to_an_archive(
    tmp_path: Path, ending: str, make: Callable[[], bytes], amount: int
) -> None:
    content, path = make(), tmp_path / f"x{ending}"

    def read() -> None:
        source = open_source(str(path))
        for item in range(len(source)):
            source.image(item)

    @examples(amount, EDITS)
    def check(edits: list[Edit]) -> None:
        path.write_bytes(edited(content, edits))
        refused_or_read(read)

    check()


@pytest.mark.parametrize("kind", ["cls", "json", "txt"])
@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_label(tmp_path: Path, kind: str, amount: int) -> None:
    image, path = encoded("PNG"), tmp_path / "x.tar"

    @examples(amount, st.binary(max_size=12) | JSON.map(lambda value: json.dumps({"label": value}).encode()))
    def check(label: bytes) -> None:
        with tarfile.open(path, "w") as archive:
            for ending, content in (("png", image), (kind, label)):
                member = tarfile.TarInfo(f"s.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        refused_or_read(lambda: open_source(str(path)))

    check()


COLUMNS = st.one_of(
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3),
    st.lists(st.none() | st.text(max_size=6), min_size=3, max_size=3),
    st.lists(st.none() | st.floats(), min_size=3, max_size=3),
    st.lists(st.none() | st.booleans(), min_size=3, max_size=3),
    st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=3, max_size=3),
    st.lists(st.binary(max_size=4), min_size=3, max_size=3),
)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_column_of_labels(tmp_path: Path, amount: int) -> None:
    image, path = encoded("PNG"), tmp_path / "x.parquet"

    @examples(amount, st.sampled_from(["label", "target", "fine_label", "x"]), COLUMNS)
    def check(name: str, values: list[Any]) -> None:
        pq.write_table(pa.table({"image": [image] * 3, name: pa.array(values)}), path)
        refused_or_read(lambda: open_source(str(path)))

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_damage_to_a_table_of_images(tmp_path: Path, amount: int) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [encoded("PNG")] * 3, "label": [0, 1, 2]}), path)
    content = path.read_bytes()

    def read() -> None:
        source = open_source(str(path))
        for item in range(len(source)):
            source.image(item)

    @examples(amount, EDITS)
    def check(edits: list[Edit]) -> None:
        path.write_bytes(edited(content, edits))
        refused_or_read(read)

    check()


URI_TEXT = st.text(alphabet="ab.:/@?#[]%&=~\\ \x00\x1b\u202e\udc80é0", max_size=20)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_any_text_behind_a_scheme(amount: int) -> None:
    @examples(amount * 5, st.sampled_from(["http://", "https://", "s3://", "ftp://", "://"]), URI_TEXT)
    def check(scheme: str, rest: str) -> None:
        refused_or_read(lambda: open_storage(scheme + rest))

    check()
