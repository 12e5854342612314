"""Sets of generated images as a source: labels of the manifest, and refusals of sets that were changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from soflow_pipelines.sources.generated import MANIFEST_NAME, MANIFEST_SCHEMA, SETTINGS_NAME
from soflow_pipelines.sources.opening import SourceOptions, open_source
from soflow_pipelines.sources.source import SourceError

SHAPE = [3, 8, 8]


def write_set(folder: Path, **changed: list[Any]) -> Path:
    """A finished set of two PNG files; `changed` replaces columns of its manifest."""
    folder.mkdir(exist_ok=True)
    names = [f"00000{i}-label-{i}.png" for i in range(2)]
    for i, name in enumerate(names):
        Image.fromarray(np.full((8, 8, 3), 100 * i, np.uint8)).save(folder / name)
    columns = {
        "index": [0, 1],
        "label": [0, 1],
        "class_name": ["cat", "dog"],
        "seed": [0, 0],
        "part": names,
        "key": [name.removesuffix(".png") for name in names],
        "sha256": ["0" * 64, "1" * 64],
        **changed,
    }
    pq.write_table(pa.table(columns, schema=MANIFEST_SCHEMA), folder / MANIFEST_NAME)
    (folder / SETTINGS_NAME).write_text(json.dumps({"format": "png", "shape": SHAPE}))
    return folder


def test_labels_and_class_names_are_those_of_the_manifest(tmp_path: Path) -> None:
    source = open_source(str(write_set(tmp_path / "set")))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]
    assert source.class_names == ("cat", "dog")
    assert source.label_origin == MANIFEST_NAME
    assert source.resolution == 8
    assert source.image(1).getpixel((0, 0)) == (100, 100, 100)


def test_labels_are_left_aside_where_that_is_asked_for(tmp_path: Path) -> None:
    source = open_source(str(write_set(tmp_path / "set")), SourceOptions(unlabelled=True))
    assert source.labels is None
    assert source.class_names == ()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("part", ["../secret.png", "a.png"], "not the plain name of a file"),
        ("part", ["/etc/passwd", "a.png"], "not the plain name of a file"),
        ("label", [-1, 0], "labels are -1 to 0"),
        ("label", [0, 2**40], "labels are 0 to"),
    ],
)
def test_a_manifest_that_was_changed_is_refused(
    tmp_path: Path, column: str, values: list[Any], message: str
) -> None:
    folder = write_set(tmp_path / "set", **{column: values})
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(folder))
    assert MANIFEST_NAME in str(caught.value)


def test_a_manifest_of_other_columns_is_refused(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    pq.write_table(pa.table({"index": [0, 1]}), folder / MANIFEST_NAME)
    with pytest.raises(SourceError, match="its columns are index"):
        open_source(str(folder))


def test_a_set_without_its_manifest_is_not_finished(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "set")
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(SourceError, match="not finished"):
        open_source(str(folder))
