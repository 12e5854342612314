"""The contract of a data source, for every registered one or those of `--source`, on its `example`."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from soflow_pipelines.sources.source import Source, SourceError, SourceKind, SourceOptions

LOOKED_AT = 20
"""Images of a source that are read."""


@pytest.fixture
def place(source_class: type[SourceKind], tmp_path: Path) -> Path:
    example = source_class.example(tmp_path)
    if example is None and source_class.expected is None:
        pytest.fail(f"the suite has no data for {source_class.__name__}: define the classmethod `example`")
    return example or Path()


@pytest.fixture
def source(source_class: type[SourceKind], place: Path) -> Source:
    return source_class().open(place, SourceOptions())


def items(source: Source) -> list[int]:
    return list(range(0, len(source), max(1, len(source) // LOOKED_AT)))


def pixels(source: Source) -> list[np.ndarray]:
    return [np.asarray(source.image(item)) for item in items(source)]


def test_it_lists_images_with_labels_and_names(source: Source) -> None:
    assert len(source) > 0
    assert source.name
    assert source.digest
    assert source.ignored >= 0
    names = [source.item_name(item) for item in items(source)]
    assert len(set(names)) == len(names), "messages name each image"
    if source.labels is None:
        assert source.class_names == ()
        return
    assert source.labels.shape == (len(source),)
    assert 0 <= source.labels.min() <= source.labels.max() < len(source.class_names)
    assert source.label_origin


def test_images_have_the_channels_and_the_size_that_it_says(source: Source) -> None:
    assert source.channels in (1, 3)
    for item in items(source):
        image = source.image(item)
        assert image.mode == ("L" if source.channels == 1 else "RGB")
        if source.resolution is not None:
            assert image.size == (source.resolution, source.resolution)


def test_it_is_the_same_when_it_is_opened_again(
    source_class: type[SourceKind], source: Source, place: Path
) -> None:
    again = source_class().open(place, SourceOptions())
    assert (again.digest, len(again)) == (source.digest, len(source))
    assert [source.item_name(i) for i in items(source)] == [again.item_name(i) for i in items(again)]
    assert all(map(np.array_equal, pixels(source), pixels(again)))
    if source.labels is not None:
        assert np.array_equal(source.labels, again.labels)  # type: ignore[arg-type]


def test_another_process_reads_the_same_images(source: Source) -> None:
    """Workers get a source by pickle, before and after it was read here."""
    expected = pixels(source)
    assert all(map(np.array_equal, expected, pixels(pickle.loads(pickle.dumps(source)))))


def test_blocks_hold_every_image_once(source: Source) -> None:
    if source.block_ends is not None:
        ends = source.block_ends.tolist()
        assert ends == sorted(set(ends))
        assert ends[-1] == len(source)


def test_it_is_what_it_is_expected_to_be(source_class: type[SourceKind], source: Source) -> None:
    expected = source_class.expected
    if expected is None:
        pytest.skip("it needs a path")
    assert expected.shape == (source.channels, source.resolution, source.resolution)
    assert expected.classes == (None if source.labels is None else len(source.class_names))


def test_a_path_that_is_not_there_is_refused_in_a_sentence(
    source_class: type[SourceKind], tmp_path: Path
) -> None:
    if source_class.expected is not None:
        pytest.skip("it needs no path")
    with pytest.raises(SourceError, match="nowhere"):
        source_class().open(tmp_path / "nowhere", SourceOptions())
