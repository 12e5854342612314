"""Sources: the same images with the same labels, whatever they lie in."""

import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from soflow_pipelines.images.decode import ImageError
from soflow_pipelines.preparation.builtin import ensure_builtin
from soflow_pipelines.sources.cifar10 import CIFAR10_CLASSES
from soflow_pipelines.sources.opening import SourceOptions, absolute_source, open_source
from soflow_pipelines.sources.source import Source, SourceError

CLASSES = ("bear", "cat", "owl")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 9), (value, 2 * value, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def listing() -> list[tuple[str, int, bytes]]:
    """(path, label, content) of nine images, three of each class."""
    return [(f"{name}/{i}.png", c, png(10 * c + i)) for c, name in enumerate(CLASSES) for i in range(3)]


def write_tree(root: Path) -> None:
    for path, _, content in listing():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def as_folder(base: Path) -> str:
    write_tree(base / "train")
    return str(base)


def as_imagenet_like_tree(base: Path) -> str:
    write_tree(base / "ILSVRC" / "Data" / "CLS-LOC" / "train")
    return str(base)


def as_zip(base: Path) -> str:
    with zipfile.ZipFile(base / "images.zip", "w") as archive:
        for path, _, content in listing():
            archive.writestr(f"train/{path}", content)
    return str(base / "images.zip")


def as_parquet(base: Path) -> str:
    rows = listing()
    table = pa.table(
        {
            "image": [{"bytes": content, "path": path} for path, _, content in rows],
            "label": [label for _, label, _ in rows],
        }
    )
    features = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, base / "train-00000.parquet", row_group_size=4)
    return str(base)


def as_parquet_of_strings(base: Path) -> str:
    rows = listing()
    table = pa.table({"picture": [row[2] for row in rows], "class": [CLASSES[row[1]] for row in rows]})
    pq.write_table(table, base / "data.parquet")
    return str(base / "data.parquet")


def as_webdataset(base: Path) -> str:
    for shard in range(3):
        with tarfile.open(base / f"{shard:03d}.tar", "w") as archive:
            for number, (_, label, content) in list(enumerate(listing()))[shard * 3 : shard * 3 + 3]:
                for suffix, data in (("png", content), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return str(base)


def seen(source: Source) -> list[tuple[int, tuple[int, ...]]]:
    assert source.labels is not None
    return sorted(
        (int(source.labels[item]), source.image(item).getpixel((3, 3))) for item in range(len(source))
    )


FORMS = [as_folder, as_imagenet_like_tree, as_zip, as_parquet, as_parquet_of_strings, as_webdataset]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_with_the_same_labels(tmp_path: Path, form) -> None:
    source = open_source(form(tmp_path))
    assert len(source) == 9
    expected = sorted((c, (10 * c + i, 20 * c + 2 * i, 0)) for c in range(3) for i in range(3))
    assert seen(source) == expected
    if form is not as_webdataset:
        assert source.class_names == CLASSES


@pytest.mark.parametrize("form", FORMS)
def test_a_source_can_be_sent_to_another_process(tmp_path: Path, form) -> None:
    source = open_source(form(tmp_path))
    source.image(0)
    assert seen(pickle.loads(pickle.dumps(source))) == seen(source)


def test_the_digest_of_a_listing_does_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    assert open_source(as_folder(first)).digest == open_source(as_folder(second)).digest
    (second / "train" / "cat" / "4.png").write_bytes(png(5))
    assert open_source(str(second)).digest != open_source(str(first)).digest


def test_synsets_get_the_usual_class_order_of_imagenet(tmp_path: Path) -> None:
    for synset in ("n01440764", "n15075141", "n02123045"):
        (tmp_path / "train" / synset).mkdir(parents=True)
        (tmp_path / "train" / synset / "x.JPEG").write_bytes(png(1))
    source = open_source(str(tmp_path))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 281, 999]
    assert len(source.class_names) == 1000
    assert source.class_names[281].startswith("n02123045 tabby")


def test_images_of_no_class_have_no_labels(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png(1))
    source = open_source(str(tmp_path))
    assert source.labels is None
    assert len(source) == 1


def test_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("a note")
    assert open_source(str(tmp_path)).ignored == 1


def test_another_split_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "val" / "cat").mkdir(parents=True)
    (tmp_path / "val" / "cat" / "x.png").write_bytes(png(1))
    assert len(open_source(str(tmp_path), SourceOptions(split="val"))) == 1
    assert len(open_source(str(tmp_path))) == 9


def test_the_digits_and_our_own_shards_of_them_hold_the_same(tmp_path: Path) -> None:
    digits = open_source("digits")
    shards = open_source(str(ensure_builtin("digits", tmp_path / "digits")))
    assert (digits.channels, shards.channels) == (1, 1)
    assert digits.labels is not None
    assert shards.labels is not None
    assert shards.class_names == digits.class_names
    np.testing.assert_array_equal(shards.labels, digits.labels)
    for item in (0, 1000, 1796):
        np.testing.assert_array_equal(np.asarray(shards.image(item)), np.asarray(digits.image(item)))


def test_the_binary_archive_of_cifar10_is_read(tmp_path: Path) -> None:
    records = np.random.default_rng(0).integers(0, 256, (20, 3073)).astype(np.uint8)
    records[:, 0] %= 10
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, part in (("data_batch_1", records[:15]), ("test_batch", records[15:])):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = part.nbytes
            archive.addfile(member, io.BytesIO(part.tobytes()))
    source = open_source(f"cifar10:{tmp_path / 'cifar-10-binary.tar.gz'}")
    assert len(source) == 15
    assert source.class_names == CIFAR10_CLASSES
    np.testing.assert_array_equal(np.asarray(source.image(7)).transpose(2, 0, 1).ravel(), records[7, 1:])
    assert (
        len(open_source(f"cifar10:{tmp_path / 'cifar-10-binary.tar.gz'}", SourceOptions(split="test"))) == 5
    )


def test_a_source_is_the_same_from_another_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("images", "./images", "~/images"):
        assert absolute_source(text) == str(tmp_path / "images")
        assert absolute_source(f"cifar10:{text}") == f"cifar10:{tmp_path / 'images'}"
    assert absolute_source("digits") == "digits"


def test_cifar10_classes_keep_their_order_when_some_are_absent(tmp_path: Path) -> None:
    (tmp_path / "train" / "truck").mkdir(parents=True)
    (tmp_path / "train" / "truck" / "0.png").write_bytes(png(3))
    source = open_source(f"cifar10:{tmp_path}")
    assert source.labels is not None
    assert source.labels.tolist() == [9]
    assert source.resolution == 32


def test_a_damaged_image_is_named_by_its_source(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "train" / "cat" / "1.png").write_bytes(png(1)[:40])
    source = open_source(str(tmp_path))
    with pytest.raises(ImageError, match=r"^cat/1\.png: "):
        source.image(4)


def test_a_damaged_member_of_a_zip_is_named(tmp_path: Path) -> None:
    path = Path(as_zip(tmp_path))
    content = path.read_bytes()
    path.write_bytes(content.replace(png(11), png(11)[:-20] + b"\0" * 20))
    with pytest.raises(ImageError, match=r"cat/1\.png: damaged in the zip"):
        open_source(str(path)).image(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda base: base / "absent", "does not exist"),
        (lambda base: base, "holds no images"),
        (lambda base: base / "text.md", "is no folder"),
        (lambda base: base / "broken.zip", "not a zip file"),
        (lambda base: base / "broken.tar", "cannot be read as a WebDataset"),
        (lambda base: base / "broken.parquet", "cannot be read as Parquet"),
    ],
)
def test_what_is_no_source_is_refused_in_a_sentence(tmp_path: Path, make, message: str) -> None:
    path = make(tmp_path)
    if path.suffix:
        path.write_bytes(b"nothing of the kind" * 40)
    with pytest.raises(SourceError, match=message):
        open_source(str(path))


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    as_folder(tmp_path)
    (tmp_path / "train" / "stray.png").write_bytes(png(1))
    with pytest.raises(SourceError, match=r"beside its class folders, such as stray\.png"):
        open_source(str(tmp_path))
