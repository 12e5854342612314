"""Arrow reads tables from its own buffers and files: its threads call a Python file, which aborts a process that is ending."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from soflow_pipelines.shards.info import ShardError
from soflow_pipelines.shards.tables import INDEX_SCHEMA, read_table
from soflow_pipelines.storage.opening import open_storage

PYTHON_FILE = re.compile(r"pq\.(read_\w+|ParquetFile)\(\s*(io\.BytesIO|open\(|pa\.PythonFile)")
ROOT = Path(__file__).parents[3]


def test_no_module_hands_a_python_file_to_arrow() -> None:
    texts = {
        path.name: path.read_text()
        for folder in ("platform", "pipelines")
        for path in (ROOT / folder).rglob("*.py")
    }
    users = {name for name, text in texts.items() if "import pyarrow.parquet" in text}
    assert {"tables.py", "state.py", "parquet.py"} <= users
    assert [name for name in users if PYTHON_FILE.search(texts[name])] == []


def test_a_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    rows = {
        name: pa.array([0], kind)
        for name, kind in zip(INDEX_SCHEMA.names, INDEX_SCHEMA.types, strict=True)
        if name != "key"
    }
    bad = pa.array([b"\x80\xff"]).cast(pa.string(), safe=False)
    columns = [bad if name == "key" else rows[name] for name in INDEX_SCHEMA.names]
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), tmp_path / "index.parquet")
    with pytest.raises(ShardError, match="UTF8"):
        read_table(open_storage(tmp_path), "index.parquet", INDEX_SCHEMA)
