"""Completes a set of generated images: `samples.npz`, the grid, the manifest; checks a finished one."""

from __future__ import annotations

import hashlib
import io
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from soflow_core.failures import summarize
from soflow_pipelines.images.encode import encode_png, image_grid
from soflow_pipelines.sources.generated import MANIFEST_NAME, MANIFEST_SCHEMA, SETTINGS_NAME
from soflow_pipelines.storage.files import BLOCK_BYTES, sha256
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage, staging_folder
from soflow_platform.errors import JobError, UserError
from soflow_platform.generation.chosen_labels import rejected_table
from soflow_platform.generation.output_formats import FORMATS, NpzFormat, PngFormat
from soflow_platform.generation.parts import PartFile, files_of, record_bytes, through_outages
from soflow_platform.generation.plan import (
    GRID_NAME,
    NPZ_NAME,
    PARTS_FOLDER,
    REJECTED_NAME,
    GenerationPlan,
    read_settings,
)

GRID_SIDE = 10
"""Images in a row and in a column of the grid."""
VISIBLE_PIXELS = 48
"""Smallest side of an image in the grid."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest time that a zip file can hold."""
LISTED = 20
"""Damages of one kind that are named."""


def finish(plan: GenerationPlan, store: ObjectStore) -> None:
    """Writes what a set has beside its parts, all of which are there; the manifest last. Raises JobError, StorageError."""
    records = [_read_table(store, plan.record_name(part)) for part in range(plan.parts)]
    table = pa.concat_tables([record.replace_schema_metadata(None) for record in records])
    if not np.array_equal(table["index"].to_numpy(), plan.chosen.indices):
        raise JobError(
            f"{store.uri}: the records of its parts do not list every image once; remove {PARTS_FOLDER} and run the command again."
        )
    files = [file for record in records for file in files_of(record).values()]
    if isinstance(plan.format, NpzFormat):
        files = [_publish_npz(plan, store, files)]
    if isinstance(plan.format, PngFormat):
        _write(store, GRID_NAME, _grid(store, table["part"][: GRID_SIDE**2].to_pylist()))
    if plan.chosen.rejected:
        buffer = io.BytesIO()
        pq.write_table(rejected_table(plan.chosen.rejected), buffer)
        _write(store, REJECTED_NAME, buffer.getvalue())
    _write(store, MANIFEST_NAME, record_bytes(table, files))
    remove_leftovers(store, raw_pixels=True)


def remove_leftovers(store: ObjectStore, raw_pixels: bool = False) -> None:
    """Removes what a killed command left in its staging folders, and with `raw_pixels` the parts of a finished `samples.npz`."""
    if isinstance(store, LocalFolder):
        for folder in store.path(PARTS_FOLDER).glob(".*.part"):
            shutil.rmtree(folder, ignore_errors=True)
    if raw_pixels:
        for name in store.names():
            if name.startswith(f"{PARTS_FOLDER}/") and name.endswith(NpzFormat.suffix):
                store.remove(name)


def _write(store: ObjectStore, name: str, content: bytes) -> None:
    through_outages(store, f"writing {name}", lambda: store.write(name, content))


def _read_table(store: ObjectStore, name: str) -> pa.Table:
    content = through_outages(store, f"reading {name}", lambda: store.read(name))
    try:
        return pq.read_table(pa.BufferReader(content))
    except pa.ArrowException as error:
        raise JobError(
            f"{store.uri}/{name} is damaged ({summarize(error)}): remove it and run the command again."
        ) from None


def _grid(store: ObjectStore, names: Sequence[str]) -> bytes:
    """The first images as one picture."""
    pictures = [
        np.asarray(Image.open(io.BytesIO(store.read(name))).convert("RGB")).transpose(2, 0, 1)
        for name in names
    ]
    enlarge = max(1, VISIBLE_PIXELS // pictures[0].shape[1])
    return encode_png(image_grid(np.stack(pictures), columns=GRID_SIDE, enlarge=enlarge))


def _publish_npz(plan: GenerationPlan, store: ObjectStore, raw: Sequence[PartFile]) -> PartFile:
    """Puts raw pixels together, a block at a time."""
    _, height, width = plan.settings["shape"]
    with staging_folder(store, PARTS_FOLDER) as staging:
        path = staging / NPZ_NAME
        with zipfile.ZipFile(path, "w") as archive:
            with _member(archive, "arr_0.npy") as member:
                member.write(_npy_header((plan.count, height, width, 3), np.dtype(np.uint8)))
                for file in raw:
                    with store.open(file.name) as pixels:
                        shutil.copyfileobj(pixels, member, BLOCK_BYTES)
            if plan.chosen.labels is not None:
                with _member(archive, "arr_1.npy") as member:
                    np.lib.format.write_array(member, plan.chosen.labels.astype(np.int64), version=(1, 0))
        published = PartFile(NPZ_NAME, path.stat().st_size, sha256(path))
        through_outages(store, f"publishing {NPZ_NAME}", lambda: store.publish(NPZ_NAME, path))
    return published


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    """A member to be written, which may become larger than 4 GB."""
    return archive.open(zipfile.ZipInfo(name, EPOCH), "w", force_zip64=True)


def _npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    buffer = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue()


def no_count(done: int, total: int) -> None:
    """For a caller that shows no progress."""
    del done, total


def verify(uri: str, count: Callable[[int, int], None] = no_count) -> tuple[int, list[str]]:
    """Reads a finished set once, whole. Returns the number of its images, and every damage as a sentence.

    `count` is called with the number of checked images and of all. Raises UserError where there is no set, or an unfinished one.
    """
    store = open_storage(uri)
    names = store.names()
    if SETTINGS_NAME not in names:
        raise UserError(f"{uri} holds no set that `soflowctl generate` made: it has no {SETTINGS_NAME}.")
    settings = read_settings(store)
    if "per_part" not in settings:
        raise UserError(f"{uri} was made by an earlier version of soflow, which wrote no checksums.")
    if MANIFEST_NAME not in names:
        raise UserError(
            f"{uri} is not finished: run its `soflowctl generate` again, which makes what is missing."
        )
    try:
        manifest = pq.read_table(pa.BufferReader(store.read(MANIFEST_NAME)))
        if not manifest.schema.equals(MANIFEST_SCHEMA):
            raise pa.ArrowInvalid(f"its columns are {', '.join(manifest.column_names)}")
        files_of(manifest)
    except (pa.ArrowException, ValueError) as error:
        return 0, [f"{MANIFEST_NAME} is damaged: {summarize(error)}"]
    damages = [*_index_damages(settings, manifest, store, names), *_unlisted(settings, manifest, names)]
    damages += _content_damages(settings, manifest, store, set(names), count)
    return manifest.num_rows, damages


def _index_damages(
    settings: dict[str, Any], manifest: pa.Table, store: ObjectStore, names: Sequence[str]
) -> Iterator[str]:
    """Images that are missing from the manifest, or in it twice."""
    expected = set(range(int(settings["num"])))
    if REJECTED_NAME in names:
        expected -= set(_read_table(store, REJECTED_NAME)["row"].to_pylist())
    counts = Counter(manifest["index"].to_pylist())
    missing, twice = sorted(expected - set(counts)), sorted(i for i, times in counts.items() if times > 1)
    unknown = sorted(set(counts) - expected)
    for kind, indices in (
        ("is missing from", missing),
        ("is twice in", twice),
        ("does not belong into", unknown),
    ):
        yield from (f"image {index} {kind} {MANIFEST_NAME}" for index in indices[:LISTED])
        if len(indices) > LISTED:
            yield f"and {len(indices) - LISTED} more"


def _unlisted(settings: dict[str, Any], manifest: pa.Table, names: Sequence[str]) -> Iterator[str]:
    """Files of images that the manifest does not list."""
    suffix = (
        f".{NPZ_NAME.rpartition('.')[2]}"
        if settings["format"] == "npz"
        else FORMATS[settings["format"]].suffix
    )
    listed = {*manifest["part"].to_pylist(), GRID_NAME, MANIFEST_NAME, REJECTED_NAME}
    for name in names:
        if name.endswith(suffix) and "/" not in name and name not in listed:
            yield f"{name} is not listed in {MANIFEST_NAME}"


def _content_damages(
    settings: dict[str, Any],
    manifest: pa.Table,
    store: ObjectStore,
    names: set[str],
    count: Callable[[int, int], None],
) -> Iterator[str]:
    """Files that are not there or are not as they were written, and images that are not under their key."""
    files = files_of(manifest)
    checked, total = 0, manifest.num_rows
    for part, rows in _by_part(manifest):
        if part not in names:
            yield f"{part} is missing ({len(rows)} images)"
        else:
            yield from _file_damages(settings, store, part, files.get(part), rows)
        checked += len(rows)
        count(checked, total)


def _by_part(manifest: pa.Table) -> Iterator[tuple[str, dict[str, str]]]:
    """Each file with the digest of each of its keys."""
    rows: dict[str, dict[str, str]] = {}
    for part, key, digest in zip(
        *(manifest[column].to_pylist() for column in ("part", "key", "sha256")), strict=True
    ):
        rows.setdefault(part, {})[key] = digest
    yield from rows.items()


def _file_damages(
    settings: dict[str, Any], store: ObjectStore, part: str, file: PartFile | None, rows: dict[str, str]
) -> Iterator[str]:
    kind = FORMATS[settings["format"]]
    try:
        with _on_this_machine(store, part) as path:
            if file is not None and (path.stat().st_size != file.bytes or sha256(path) != file.sha256):
                yield f"{part} is not as it was written: its checksum differs"
            found = {key: hashlib.sha256(content).hexdigest() for key, content in kind.read(path)}
    except Exception as error:
        # Whatever a damaged file makes its reader raise is its damage.
        if isinstance(error, StorageError):
            raise
        yield f"{part} cannot be read: {summarize(error)}"
        return
    for key, digest in rows.items():
        if key not in found:
            yield f"{part}: {key} is missing"
        elif found[key] != digest:
            yield f"{part}: {key} is not as it was written: its checksum differs"
    for key in found.keys() - rows.keys():
        yield f"{part}: {key} is not listed in {MANIFEST_NAME}"


@contextmanager
def _on_this_machine(store: ObjectStore, name: str) -> Iterator[Path]:
    """A file of a store as a local path, under its own name."""
    if isinstance(store, LocalFolder):
        yield store.path(name)
        return
    with tempfile.TemporaryDirectory(prefix="soflow-verify-") as folder:
        copy = Path(folder) / Path(name).name
        with store.open(name) as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
        yield copy
