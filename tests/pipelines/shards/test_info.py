"""The description of a shard set: written, read back, also by other versions."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from soflow_pipelines.shards.info import WRITER_VERSION, DatasetInfo

INFO = DatasetInfo(
    kind="latents",
    shape=(4, 8, 8),
    dtype="float16",
    classes=2,
    class_names=("cat", "owl"),
    left_out=("cat/1.png: damaged",),
    recipe={"source": "images", "seed": 3},
    digest="sha256:0123456789abcdef0123",
)


def test_a_description_is_read_back_from_its_text_and_its_dictionary() -> None:
    assert DatasetInfo.from_json(INFO.to_json()) == INFO
    assert DatasetInfo.from_dict(json.loads(json.dumps(asdict(INFO)))) == INFO


def test_an_unknown_field_is_ignored_and_a_newer_version_is_refused() -> None:
    content = asdict(INFO)
    assert DatasetInfo.from_dict({**content, "added_later": 1}) == INFO
    with pytest.raises(ValueError, match=f"version {WRITER_VERSION + 1}, this soflow reads up to"):
        DatasetInfo.from_dict({**content, "writer_version": WRITER_VERSION + 1})


@pytest.mark.parametrize("text", ["[]", "3", "{", '{"kind": "pixels"}'])
def test_a_text_that_is_no_description_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        DatasetInfo.from_json(text)


def test_a_short_digest_is_without_the_name_of_the_algorithm() -> None:
    assert INFO.short_digest() == "0123456789abcdef"
    assert INFO.short_digest(4) == "0123"
