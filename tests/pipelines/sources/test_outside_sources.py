"""Sources from elsewhere: what cannot be used is refused in a sentence or counted, and costs no memory before that."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from soflow_pipelines.images.decode import ImageError, centre_crop, decode_image
from soflow_pipelines.images.limits import ImageLimits
from soflow_pipelines.preparation.build import DamagedImages, prepare_locally
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import SourceOptions, open_source
from soflow_pipelines.sources.parquet import MOST_OPEN
from soflow_pipelines.sources.source import SourceError
from soflow_pipelines.storage.opening import open_storage


def encoded(kind: str = "PNG", size: tuple[int, int] = (12, 9), value: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 0)).save(buffer, format=kind)
    return buffer.getvalue()


PNG = encoded()


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> str:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def write_zip(path: Path, members: list[tuple[str, bytes]]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return str(path)


def thin_png(width: int, height: int = 1) -> bytes:
    """A one-bit PNG, made without its pixels in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = (b"\0" + bytes(-(-width // 8))) * height
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def old_crop(image: Image.Image, size: int) -> Image.Image:
    """The crop as ADM's evaluation makes it, of the whole image."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


SIZES = [
    (500, 375),
    (375, 500),
    (256, 256),
    (257, 300),
    (40, 30),
    (1201, 803),
    (33, 528),
    (640, 41),
    (7, 9),
    (1, 16),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [8, 64, 256])
def test_the_crop_of_an_ordinary_image_has_the_same_bits(size: tuple[int, int], side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    assert np.array_equal(np.asarray(centre_crop(image, side)), np.asarray(old_crop(image, side)))


@pytest.mark.parametrize("size", [(2048, 64), (64, 2048), (1700, 32)])
def test_the_crop_of_a_thin_image_is_of_its_middle(size: tuple[int, int]) -> None:
    across = np.linspace(0, 255, size[0])[None].repeat(size[1], 0)
    down = np.linspace(0, 255, size[1])[:, None].repeat(size[0], 1)
    image = Image.fromarray(np.stack([across, down, across], 2).astype(np.uint8))
    found, expected = (np.asarray(crop(image, 64), float) for crop in (centre_crop, old_crop))
    assert np.abs(found - expected).max() <= 8


@pytest.mark.parametrize(("width", "side"), [(10_000, 256), (1_000_000, 256), (1_000_000, 16)])
def test_a_thin_image_takes_no_memory(width: int, side: int) -> None:
    content = thin_png(width)
    code = (
        "import resource, sys\n"
        "from soflow_pipelines.images.decode import centre_crop, decode_image\n"
        f"content = bytes.fromhex({content.hex()!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "from soflow_pipelines.images.limits import ImageLimits\n"
        "limits = ImageLimits(ratio=10**7)\n"
        f"assert centre_crop(decode_image(content, 'x', limits), {side}).size == ({side}, {side})\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100_000


FOREIGN_CONTENT = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%Page: 1 1\nshowpage\n",
    b"8BPS\0\1" + bytes(200),
    *(encoded(kind, (16, 16)) for kind in ("ICO", "DDS", "PCX", "SGI", "TGA")),
]


@pytest.mark.parametrize("content", FOREIGN_CONTENT, ids=range(len(FOREIGN_CONTENT)))
def test_other_formats_are_not_decoded_whatever_they_are_called(content: bytes) -> None:
    with pytest.raises(ImageError, match=r"b\.png: not an image that can be read \(JPEG, PNG"):
        decode_image(content, "b.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO"])
def test_documented_formats_are_decoded(kind: str) -> None:
    assert decode_image(encoded(kind), "x").size == (12, 9)


def test_an_image_beyond_a_limit_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        ImageError, match=r"x: 2000 x 1000 pixels, more than the 1 million .*--max-megapixels"
    ):
        decode_image(thin_png(2000, 1000), "x", ImageLimits(megapixels=1))
    for width, height in ((1001, 1), (1, 1001), (2100, 2)):
        with pytest.raises(ImageError, match=rf"x: {width} x {height} pixels, .* 1,000 to 1 .*--max-ratio"):
            decode_image(thin_png(width, height), "x")
    assert decode_image(thin_png(1000, 1), "x").size == (1000, 1)
    assert decode_image(thin_png(2100, 1), "x", ImageLimits(ratio=2100)).size == (2100, 1)
    bomb = write_zip(tmp_path / "bomb.zip", [("a/g.png", bytes(3 * 2**20)), ("a/h.png", PNG)])
    source = open_source(bomb, SourceOptions(limits=ImageLimits(file_megabytes=1)))
    with pytest.raises(
        ImageError, match=r"a/g\.png: 3 MiB, more than the 1 MiB that are read \(--max-file-mb\)"
    ):
        source.image(0)
    assert source.image(1).size == (12, 9)


def test_a_member_that_grows_beyond_the_limit_is_not_unpacked(tmp_path: Path) -> None:
    """Deflate cannot grow that much; bzip2 and LZMA can, to gigabytes of a few kilobytes."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/g.bmp", encoded("BMP", (600, 600)))
        archive.writestr("a/h.png", PNG)
    source = open_source(str(path))
    with pytest.raises(
        ImageError, match=r"a/g\.bmp: [\d,]+ bytes that unpack to 1,080,054, .*1,100 times .*--max-growth"
    ):
        source.image(0)
    assert source.image(1).size == (12, 9)
    free = open_source(str(path), SourceOptions(limits=ImageLimits(growth=10**6)))
    assert free.image(0).size == (600, 600)


def test_npy_members_have_the_limits_of_images(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 5000, 3), np.uint8))
    path = write_tar(tmp_path / "x.tar", [("a.npy", buffer.getvalue())])
    with pytest.raises(ImageError, match=r"a\.npy: 3 x 5000 pixels, .*--max-ratio"):
        open_source(path).image(0)


NPY_BAD = [
    b"PK\3\4junk",
    b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000,
    *(
        b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
        for header in (
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (0, 0, 3), }\n",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (0, 16, 3), }\n",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 1000000000, 3), }\n",
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 16, 3), }\n",
            b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 3), }\n",
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (1, 1, 3), }\n",
        )
    ),
    b"",
]


@pytest.mark.parametrize("content", NPY_BAD, ids=range(len(NPY_BAD)))
def test_a_damaged_npy_member_is_named_and_can_be_left_out(tmp_path: Path, content: bytes) -> None:
    source = open_source(write_tar(tmp_path / "x.tar", [("a.npy", content), ("b.png", PNG)]))
    with pytest.raises(ImageError, match=r"x\.tar: a\.npy: damaged"):
        source.image(0)
    store = open_storage(tmp_path / "out")
    with pytest.raises(DamagedImages):
        prepare_locally(ShardPlan(source, PrepareSettings(8)), open_storage(tmp_path / "failed"))
    info = prepare_locally(ShardPlan(source, PrepareSettings(8, skip_damaged=True)), store)
    assert (info.samples, len(info.left_out)) == (1, 1)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(5, 7, 3), (3, 5, 7), (5, 7, 1), (1, 5, 7)])
def test_npy_members_of_every_layout_are_read(tmp_path: Path, shape: tuple[int, ...], order: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(pixels, order=order))  # type: ignore[call-overload]
    image = open_source(write_tar(tmp_path / "x.tar", [("a.npy", buffer.getvalue())])).image(0)
    expected = pixels.transpose(1, 2, 0) if shape[0] in (1, 3) else pixels
    assert np.array_equal(np.asarray(image), np.broadcast_to(expected, (5, 7, 3)))


@pytest.mark.parametrize(
    "label", [b"1000000000", b"9" * 30, b"-5", b"1_0", b"1.5", b"cat", b"", b"0x1", "１".encode()]
)
def test_a_label_that_is_no_class_is_refused_by_its_member(tmp_path: Path, label: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", [("s.png", PNG), ("s.cls", label)])
    with pytest.raises(
        SourceError, match=r"x\.tar.*(s\.cls holds no label|the label .* is none of 0 to 999999)"
    ):
        open_source(path)


def test_tar_members_that_are_no_files_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for kind, name in (
            (tarfile.SYMTYPE, "l.png"),
            (tarfile.FIFOTYPE, "f.png"),
            (tarfile.CHRTYPE, "d.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/dev/zero"
            archive.addfile(member)
        for name in ("a.png", "._a.png", "__MACOSX/a.png"):
            member = tarfile.TarInfo(name)
            member.size = len(PNG)
            archive.addfile(member, io.BytesIO(PNG))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    source = open_source(str(path))
    assert (len(source), source.ignored) == (2, 5)
    assert source.image(0).tobytes() == source.image(1).tobytes()


def tar_with_second_header(path: Path, change: Callable[[bytes, int], bytes]) -> str:
    """A tar file of three images that was changed at the header of the second."""
    write_tar(path, [("a.png", PNG), ("b.png", PNG), ("c.png", PNG)])
    path.write_bytes(change(path.read_bytes(), SECOND))
    return str(path)


SECOND = 512 + -(-len(PNG) // 512) * 512


@pytest.mark.parametrize(
    "change",
    [
        lambda content, place: content[: place + 130] + b"\x7f" + content[place + 131 :],
        lambda content, place: content[: place + 100],
        lambda content, place: content[:place],
    ],
    ids=["damaged", "cut inside", "cut before"],
)
def test_a_tar_that_cannot_be_listed_to_its_end_is_refused(
    tmp_path: Path, change: Callable[[bytes, int], bytes]
) -> None:
    """Python's reader ends there without an error, and the images behind would be missing."""
    path = tar_with_second_header(tmp_path / "x.tar", change)
    with pytest.raises(SourceError, match=rf"x\.tar: no member .* from byte {SECOND} on.*download it again"):
        open_source(path)


@pytest.mark.timeout(60)
def test_a_member_of_less_than_no_bytes_is_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("back.png")
    member.size = -1024
    header = member.tobuf(tarfile.GNU_FORMAT)
    path = tar_with_second_header(
        tmp_path / "x.tar", lambda content, place: content[:place] + header + content[place:]
    )
    # Later versions of Python end at such a header.
    with pytest.raises(SourceError, match=r"x\.tar: (back\.png has -1024 bytes|no member)"):
        open_source(path)


def test_an_archive_of_cifar10_that_lost_a_batch_is_refused(tmp_path: Path) -> None:
    batches = [(f"cifar-10-batches-bin/data_batch_{number}.bin", bytes(3073)) for number in (1, 2)]
    content = bytearray(Path(write_tar(tmp_path / "x.tar", batches)).read_bytes())
    # The header of the second batch: the first has seven blocks.
    content[8 * 512 + 130] ^= 1
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(SourceError, match=r"cifar-10-binary\.tar\.gz: no member .* from byte 4096 on"):
        open_source(f"cifar10:{path}")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_refused_whatever_its_name(tmp_path: Path, mode: str) -> None:
    path = write_tar(tmp_path / "x.tar", [("a.png", PNG)], mode)
    with pytest.raises(SourceError, match=r"is compressed .* unpack it first"):
        open_source(path)


def test_members_that_come_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"a\.png comes twice"):
        open_source(write_tar(tmp_path / "x.tar", [("a.png", PNG), ("a.png", PNG)]))
    both = write_tar(tmp_path / "y.tar", [("a.png", PNG), ("a.jpg", encoded("JPEG"))])
    with pytest.raises(SourceError, match=r"a\.png, a\.jpg: say which is meant with --image-key"):
        open_source(both)
    assert open_source(both, SourceOptions(image_key="jpg")).item_name(0) == "y.tar: a.jpg"


def test_extensions_begin_at_the_first_dot_of_the_base_name(tmp_path: Path) -> None:
    members = [
        (f"v1.0/s{i}.{kind}", content)
        for i in range(3)
        for kind, content in (
            ("input.jpg", encoded("JPEG")),
            ("mask.png", PNG),
            ("target.cls", str(i).encode()),
        )
    ]
    path = write_tar(tmp_path / "x.tar", members)
    source = open_source(path, SourceOptions(image_key="input.jpg"))
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 2]
    assert source.item_name(1) == "x.tar: v1.0/s1.input.jpg"
    with pytest.raises(SourceError, match="--image-key"):
        open_source(path, SourceOptions(image_key="depth.png"))


@pytest.mark.parametrize(
    ("labels", "options", "expected", "names"),
    [
        ([("json", b'{"label": 1}'), ("json", b'{"label": 0}')], {}, [1, 0], ("0", "1")),
        ([("json", b'{"cls": "owl"}'), ("json", b'{"cls": "cat"}')], {}, [1, 0], ("cat", "owl")),
        ([("txt", b"1\n"), ("txt", b"0\n")], {}, [1, 0], ("0", "1")),
        ([("txt", b"a cat"), ("txt", b"an owl")], {}, None, ()),
        ([("json", b'{"a": {"b": 1}}'), ("json", b"{}")], {}, None, ()),
        (
            [("json", b'{"fine": 1}'), ("json", b'{"fine": 2}')],
            {"label_key": "json:fine"},
            [1, 2],
            ("0", "1", "2"),
        ),
        ([("b.cls", b"1"), ("b.cls", b"0")], {"label_key": "b.cls"}, [1, 0], ("0", "1")),
        ([("cls", b"1"), ("cls", b"0")], {"unlabelled": True}, None, ()),
    ],
)
def test_labels_are_read_from_what_people_write(
    tmp_path: Path, labels: list[tuple[str, bytes]], options: dict, expected: list[int] | None, names: tuple
) -> None:
    members = []
    for number, (kind, content) in enumerate(labels):
        members += [(f"{number}.png", PNG), (f"{number}.{kind}", content)]
    source = open_source(write_tar(tmp_path / "x.tar", members), SourceOptions(**options))
    assert (None if source.labels is None else source.labels.tolist()) == expected
    assert source.class_names == names
    assert (source.label_origin is None) == (expected is None)


def test_the_field_of_json_labels_is_named_and_so_is_one_that_differs(tmp_path: Path) -> None:
    def origin(*contents: dict[str, object], **options: str) -> str | None:
        members = []
        for number, content in enumerate(contents):
            members += [(f"{number}.png", PNG), (f"{number}.json", json.dumps(content).encode())]
        return open_source(write_tar(tmp_path / "x.tar", members), SourceOptions(**options)).label_origin

    assert origin({"label": 1, "class": 1}, {"label": 0}) == "`label` in .json"
    assert origin({"label": 1, "class": "owl"}, {"label": 0, "class": "cat"}) == (
        "`label` in .json, where `class` holds others: --label-key json:class takes those"
    )
    assert origin({"label": 1, "class": "owl"}, label_key="json:class") == "`class` in .json"
    assert origin({"label": 1}, {"cls": 0}) == "`label` or `cls` in .json"


def test_symlink_loops_neither_hang_nor_multiply_images(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "x.png").write_bytes(PNG)
    for name in ("l1", "l2"):
        (tmp_path / "src" / "a" / name).symlink_to("..")
    source = open_source(str(tmp_path / "src"))
    assert (len(source), source.ignored) == (1, 2)


def test_links_out_of_a_folder_are_followed_only_where_asked(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "x.png").write_bytes(PNG)
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "y.png").write_bytes(PNG)
    (tmp_path / "src" / "b").symlink_to(tmp_path / "far")
    with pytest.raises(SourceError, match="1 links that lead out of it, such as b: pass --follow-links"):
        open_source(str(tmp_path / "src"), SourceOptions(follow_links=False))
    assert open_source(str(tmp_path / "src")).class_names == ("a", "b")


def test_what_is_no_regular_file_is_damaged_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "a"
    folder.mkdir(parents=True)
    (folder / "good.png").write_bytes(PNG)
    os.mkfifo(folder / "fifo.png")
    (folder / "broken.png").symlink_to("nowhere")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    source = open_source(str(tmp_path / "src"))
    names = [source.item_name(item) for item in range(len(source))]
    assert names == ["a/broken.png", "a/fifo.png", "a/good.png", "a/loop.png", "a/zero.png"]
    for item in (0, 1, 3, 4):
        with pytest.raises(ImageError, match=f"{names[item]}: not a file"):
            source.image(item)
    assert source.image(2).size == (12, 9)


def test_hidden_files_and_leftovers_are_no_images_and_are_counted(tmp_path: Path) -> None:
    names = ["a/x.png", "a/._x.png", ".hidden/y.png", "a/Thumbs.db", "a/desktop.ini", "__MACOSX/a/._x.png"]
    for name in names:
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG)
    folder = open_source(str(tmp_path / "src"))
    archive = open_source(write_zip(tmp_path / "x.zip", [(name, PNG) for name in names]))
    for source in (folder, archive):
        assert (len(source), source.class_names) == (1, ("a",))
        assert source.ignored == 5


def test_a_zip_made_by_macos_has_the_classes_of_its_folder(tmp_path: Path) -> None:
    names = [
        "pets/train/cat/1.png",
        "pets/train/owl/2.png",
        "__MACOSX/pets/train/cat/._1.png",
        "pets/.DS_Store",
    ]
    source = open_source(write_zip(tmp_path / "x.zip", [(name, PNG) for name in names]))
    assert source.class_names == ("cat", "owl")


@pytest.mark.parametrize("name", ["/etc/evil.png", "//x.png", "a/../../x.png", "a//x.png", "../x.png"])
def test_a_name_that_is_no_path_inside_a_zip_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match="is not a path inside a zip file"):
        open_source(write_zip(tmp_path / "x.zip", [(name, PNG), ("a/h.png", PNG)]))


def test_encrypted_unknown_double_and_overlapping_members_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    write_zip(path, [("a/x.png", PNG), ("a/y.png", PNG)])
    content = path.read_bytes()
    central = content.index(b"PK\1\2")

    def edited(place: int, value: bytes) -> str:
        path.write_bytes(content[: central + place] + value + content[central + place + len(value) :])
        return str(path)

    for place, value, message in (
        (8, b"\1\0", r"a/x\.png is encrypted: unpack"),
        (10, struct.pack("<H", 99), r"a/x\.png is compressed in a way that is not read \(method 99\)"),
        (46, b"a/y.png", r"a/y\.png comes 2 times"),
        (20, struct.pack("<I", len(content)), "lie in the same bytes"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(edited(place, value))


def test_a_class_folder_that_is_not_utf8_is_prepared_and_comes_back(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"b"):
        folder = os.path.join(os.fsencode(tmp_path), b"src", name)
        os.makedirs(folder)
        for number, content in enumerate((PNG, PNG[:50])):
            Path(os.fsdecode(os.path.join(folder, b"%d\xff.png" % number))).write_bytes(content)
    source = open_source(str(tmp_path / "src"))
    info = prepare_locally(
        ShardPlan(source, PrepareSettings(8, skip_damaged=True)), open_storage(tmp_path / "out")
    )
    assert read_info(tmp_path / "out") == info
    assert [os.fsencode(name) for name in info.class_names] == [b"b", b"caf\xe9"]
    assert all(name.isprintable() for name in info.left_out)


def parquet(path: Path, **columns: list) -> str:
    pq.write_table(pa.table({"image": [PNG] * 3, **columns}), path)
    return str(path)


def test_the_one_column_that_may_hold_labels_is_taken_and_said(tmp_path: Path) -> None:
    source = open_source(parquet(tmp_path / "x.parquet", target=[2, 0, 1], width=[9, 9, 9]))
    assert source.label_origin == "the column target"
    several = parquet(tmp_path / "y.parquet", fine_label=[2, 0, 1], coarse_label=[0, 0, 1])
    with pytest.raises(SourceError, match="fine_label, coarse_label: choose one with --label-column"):
        open_source(several)
    assert open_source(several, SourceOptions(label_column="coarse_label")).class_names == ("0", "1")
    assert open_source(several, SourceOptions(unlabelled=True)).labels is None


def test_tables_in_many_files_keep_a_few_of_them_open(tmp_path: Path) -> None:
    """Each thread would keep all of them, and end at what a process may open: with 1024, ImageNet's 294 were too many for two."""
    count = 3 * MOST_OPEN
    for number in range(count):
        pq.write_table(pa.table({"image": [PNG], "label": [number]}), tmp_path / f"{number:02d}.parquet")

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    source = open_source(str(tmp_path))
    assert source.labels is not None
    assert source.labels.tolist() == list(range(count))
    for item in (*range(count), *reversed(range(count))):
        assert source.image(item).size == (12, 9)
    # And a few of Arrow itself.
    assert descriptors() <= before + MOST_OPEN + 4


def test_a_table_that_names_one_image_in_every_row_takes_the_memory_of_one(tmp_path: Path) -> None:
    """The file has it once, in a dictionary; as a column it would take 230 MB."""
    path = tmp_path / "x.parquet"
    image = encoded("BMP", (500, 500))
    rows = [{"bytes": image, "path": "x"}] * 300
    pq.write_table(pa.table({"image": rows}), path, dictionary_pagesize_limit=1 << 30)
    assert path.stat().st_size < 3 * len(image)
    code = (
        "import resource\n"
        "from soflow_pipelines.sources.opening import open_source\n"
        f"source = open_source({str(path)!r})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert source.image(299).size == (500, 500)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000


def test_a_table_of_more_rows_than_its_file_has_room_for_is_refused(tmp_path: Path) -> None:
    count = 10**7 + 1
    columns = {"image": pa.nulls(count, pa.binary()), "label": pa.array(np.zeros(count, np.int8))}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 150_000
    with pytest.raises(SourceError, match=r"unpack to 10,000,001 rows"):
        open_source(str(tmp_path / "x.parquet"))


def test_images_of_a_table_that_grow_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"image": pa.array([bytes(30 * 2**20)])})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    source = open_source(str(path))
    with pytest.raises(
        ImageError, match=r"row group 0, row 0: [\d,]+ bytes that unpack to 31,.*--max-growth"
    ):
        source.image(0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, None, 1], r"1 rows have no label \(rows 1,"),
        ([0, 10**9, 1], "label is 1000000000 in row 1"),
        ([0, -1, 1], "label is -1 in row 1"),
        ([0, 2**63 - 1, 1], "label is 9223372036854775807 in row 1"),
        ([0.0, 1.5, 1.0], r"label is 1\.5 in row 1"),
        ([0.0, float("nan"), 1.0], "label is nan in row 1"),
    ],
)
def test_a_label_of_parquet_that_is_no_class_is_named_by_its_row(
    tmp_path: Path, labels: list, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        open_source(parquet(tmp_path / "x.parquet", label=labels))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["data.mdb", "lock.mdb"], "is an LMDB"),
        (["state.json", "dataset_info.json", "data-00000-of-00001.arrow"], "save_to_disk"),
        (["train.h5"], "HDF5"),
        (["train.tfrecord"], "TFRecord"),
        (["images.tar.gz"], "a compressed tar file"),
    ],
)
def test_known_formats_that_are_not_read_say_what_to_do(
    tmp_path: Path, names: list[str], message: str
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))
    if len(names) == 1:
        with pytest.raises(SourceError, match=message):
            open_source(str(tmp_path / names[0]))


def test_labels_cost_no_memory_before_they_are_checked(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = write_tar(tmp_path / "x.tar", [("s.png", PNG), ("s.json", json.dumps({"label": 10**9}).encode())])
    with pytest.raises(SourceError, match="the label 1000000000 is none of"):
        open_source(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
