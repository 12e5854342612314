"""Labels follow a rule or a table, whose broken rows are named or left out without moving the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soflow_platform.errors import UserError
from soflow_platform.generation.chosen_labels import labels_by_rule, labels_of_table
from soflow_platform.generation.finished_set import verify
from tests.support.generators import digests, make_set, save_digits_generator


def table(path: Path, labels: list[int | None], column: str = "label") -> Path:
    pq.write_table(pa.table({column: pa.array(labels, pa.int64())}), path)
    return path


def test_each_rule_gives_its_labels() -> None:
    balanced = labels_by_rule(None, 7, 3, seed=0)
    assert balanced.labels is not None
    assert (balanced.rule, balanced.labels.tolist()) == ("balanced", [0, 1, 2, 0, 1, 2, 0])
    listed = labels_by_rule("2, 0", 5, 3, seed=0)
    assert listed.labels is not None
    assert (listed.rule, listed.labels.tolist()) == ("2,0", [2, 0, 2, 0, 2])
    uniform = labels_by_rule("uniform", 3000, 3, seed=1)
    assert uniform.labels is not None
    assert np.bincount(uniform.labels).min() > 900
    first = labels_by_rule("uniform", 10, 3, seed=1).labels
    assert first is not None
    assert first.tolist() == uniform.labels[:10].tolist()
    assert labels_by_rule(None, 2, None, seed=0).labels is None


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("0,x", "'x' is no label; give balanced, uniform or numbers"),
        ("evenly", "'evenly' is no label"),
        ("0,3", r"label 3 is not one of the network's 3 classes \(0 to 2\)"),
        ("-1", "'-1' is no label"),
    ],
)
def test_a_rule_that_cannot_be_used_is_refused(rule: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        labels_by_rule(rule, 4, 3, seed=0)


def test_broken_rows_of_a_table_are_named(tmp_path: Path) -> None:
    path = table(tmp_path / "labels.parquet", [0, None, 12, 3, -1])
    with pytest.raises(UserError) as caught:
        labels_of_table(path, 10, skip_bad=False)
    assert "3 rows that cannot be used" in str(caught.value)
    for said in ("row 1: no label", "row 2: label 12, labels are 0 to 9", "row 4: label -1"):
        assert said in str(caught.value)
    assert "--skip-bad" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no table"),
        (b"no parquet", "cannot be read as Parquet"),
        (pa.table({"class": [1]}), "has no column `label`; it has class"),
        (pa.table({"label": ["a"]}), "the column `label` is string; labels are integers"),
        (pa.table({"label": pa.array([None], pa.int64())}), "has no row with a label"),
    ],
)
def test_a_file_that_is_no_table_of_labels_is_refused(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "labels.parquet"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, pa.Table):
        pq.write_table(content, path)
    with pytest.raises(UserError, match=said):
        labels_of_table(path, 10, skip_bad=True)


def test_rows_left_out_do_not_change_the_others(tmp_path: Path) -> None:
    model = save_digits_generator(tmp_path / "ema.safetensors")
    whole = table(tmp_path / "whole.parquet", [i % 10 for i in range(80)])
    broken = table(tmp_path / "broken.parquet", [None if i in (3, 70) else i % 10 for i in range(80)])
    make_set(model, tmp_path / "whole", num=None, table=whole)
    done = make_set(model, tmp_path / "broken", num=None, table=broken, skip_bad=True)
    assert (done.made, done.rejected) == (78, 2)
    expected = {name: digest for name, digest in digests(tmp_path / "whole").items() if name.startswith("0")}
    made = {name: digest for name, digest in digests(tmp_path / "broken").items() if name.startswith("0")}
    assert len(expected) == 80
    del expected["000003-label-3.png"], expected["000070-label-0.png"]
    assert made == expected
    rejected = pq.read_table(tmp_path / "broken" / "rejected.parquet").to_pylist()
    assert rejected == [{"row": row, "label": None, "reason": "no label"} for row in (3, 70)]
    assert verify(str(tmp_path / "broken")) == (78, [])


def test_a_table_leaves_no_choice_of_number_and_labels(tmp_path: Path) -> None:
    model = save_digits_generator(tmp_path / "ema.safetensors")
    path = table(tmp_path / "labels.parquet", [1, 2])
    for settings in ({"num": 2}, {"num": None, "labels": "1"}):
        with pytest.raises(UserError, match="leave --num and labels out"):
            make_set(model, tmp_path / "out", table=path, **settings)


def test_a_small_file_of_very_many_rows_is_not_read(tmp_path: Path) -> None:
    """A run of equal labels takes no room in a file."""
    rows = pa.array(np.zeros(10**7 + 1, np.int8))
    pq.write_table(pa.table({"label": rows}), tmp_path / "many.parquet", row_group_size=10**8)
    assert (tmp_path / "many.parquet").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"many\.parquet cannot be read .* unpack to 10,000,001 rows"):
        labels_of_table(tmp_path / "many.parquet", 10, skip_bad=False)
    pq.write_table(
        pa.table([pa.array([1]), pa.array([2])], names=["label", "label"]), tmp_path / "two.parquet"
    )
    with pytest.raises(UserError, match=r"two\.parquet cannot be read"):
        labels_of_table(tmp_path / "two.parquet", 10, skip_bad=False)
