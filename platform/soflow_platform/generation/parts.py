"""Makes parts of a set of generated images: sampled, decoded, encoded, published whole, each with a record of its rows."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.images.convert import to_uint8
from soflow_pipelines.images.decode import ImageError, decode_image
from soflow_pipelines.sources.generated import MANIFEST_SCHEMA
from soflow_pipelines.storage.files import parse_json, sha256, sync_files, write_bytes
from soflow_pipelines.storage.local import LocalFolder
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage, staging_folder
from soflow_platform.generation.decoding import DECODED_AT_ONCE, decode_samples, require_finite
from soflow_platform.generation.generator import Generator
from soflow_platform.generation.output_formats import NpzFormat, PngFormat, Row, sample_key
from soflow_platform.generation.plan import NPZ_NAME, PARTS_FOLDER, GenerationPlan, PartTask
from soflow_platform.storage.retry import retry
from soflow_platform.tracking.outages import DISK

T = TypeVar("T")

FILES_KEY = "soflow.files"
"""Metadata of a record and of the manifest: bytes and SHA-256 of each file of several images."""
OUTAGE_SECONDS = 300.0
"""How long an object store may be away."""
BATCHES_AHEAD = 2
"""Batches that are being encoded while the next one is sampled."""


def through_outages(store: ObjectStore, description: str, action: Callable[[], T]) -> T:
    """Runs an action on a store, again while a remote store is away. Raises StorageError, JobError."""
    if isinstance(store, LocalFolder):
        return action()
    log = logging.getLogger(__name__).warning
    return retry(action, description=description, timeout=OUTAGE_SECONDS, log=log)


@contextlib.contextmanager
def naming_the_place(store: ObjectStore) -> Iterator[None]:
    """Raises StorageError with the place of the set, or of its staging folder, where a full or broken disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK or error.filename is not None:
            raise
        place = store.uri if isinstance(store, LocalFolder) else tempfile.gettempdir()
        raise StorageError(f"{place} cannot be written: {error.strerror}") from error


@dataclass(frozen=True)
class PartFile:
    """A published file of several images."""

    name: str
    bytes: int
    sha256: str


class PartMaker:
    """Makes parts, one after the other, with one network."""

    def __init__(self, plan: GenerationPlan, threads: int, count: Callable[[int], None]) -> None:
        self._plan, self._count = plan, count
        self._store = open_storage(plan.out)
        decode = not plan.format.stores_latents
        self._generator = Generator.open(
            plan.weights, plan.sampling, plan.autoencoder, decode, plan.execution
        )
        self._encoders = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    def close(self) -> None:
        """Ends the threads that encode."""
        self._encoders.shutdown()

    def make(self, task: PartTask) -> int:
        """Makes and publishes a part, then its record. Returns how many images were made.

        Raises InputError, JobError, and StorageError where the disk is full.
        """
        with naming_the_place(self._store):
            return self._make(task)

    def _make(self, task: PartTask) -> int:
        indices, labels = self._plan.rows(task.number)
        if isinstance(self._plan.format, PngFormat):
            digests, made = self._make_files(task, indices, labels)
            files: list[PartFile] = []
        else:
            digests, file = self._make_part(task.number, indices, labels)
            files, made = [file], len(indices)
        table = self._manifest_rows(task.number, indices, labels, digests)
        self._publish_record(task.number, table, files)
        return made

    def _make_part(
        self, part: int, indices: NDArray[np.int64], labels: NDArray[np.int64] | None
    ) -> tuple[list[str], PartFile]:
        plan, store = self._plan, self._store
        name = plan.format.part_name(part)
        digests = []
        with staging_folder(store, PARTS_FOLDER) as staging:
            path = staging / f"part{plan.format.suffix}"
            with plan.format.writer(path, plan.class_names) as add:
                for row in self._encoded(indices, labels):
                    add(row)
                    digests.append(hashlib.sha256(row.content).hexdigest())
            file = PartFile(name, path.stat().st_size, sha256(path))
            through_outages(store, f"publishing {name}", lambda: store.publish(name, path))
        return digests, file

    def _make_files(
        self, task: PartTask, indices: NDArray[np.int64], labels: NDArray[np.int64] | None
    ) -> tuple[list[str], int]:
        names = dict(self._plan.image_names(task.number))
        digests = {
            index: digest
            for index in sorted(task.present)
            if (digest := self._kept(names[index])) is not None
        }
        self._count(len(digests))
        absent = np.array([index not in digests for index in indices.tolist()], bool)
        for row in self._encoded(indices[absent], None if labels is None else labels[absent]):
            self._publish_image(names[row.index], row.content)
            digests[row.index] = hashlib.sha256(row.content).hexdigest()
        if isinstance(self._store, LocalFolder):
            sync_files(self._store.folder, names.values())
        return [digests[index] for index in indices.tolist()], int(absent.sum())

    def _publish_image(self, name: str, content: bytes) -> None:
        if isinstance(self._store, LocalFolder):
            # Not durable: all images of a part reach the disk together, before its record is written.
            write_bytes(self._store.path(name), content)
            return
        through_outages(self._store, f"writing {name}", lambda: self._store.write(name, content))

    def _kept(self, name: str) -> str | None:
        """SHA-256 of an image that is there; None where it cannot be decoded, as after a loss of power."""
        content = through_outages(self._store, f"reading {name}", lambda: self._store.read(name))
        try:
            decode_image(content, name)
        except ImageError:
            return None
        return hashlib.sha256(content).hexdigest()

    def _encoded(self, indices: NDArray[np.int64], labels: NDArray[np.int64] | None) -> Iterator[Row]:
        """Rows in order; threads encode while the next samples are made."""
        encode = self._plan.format.encode
        waiting: deque[list[Future[bytes]]] = deque()
        numbers = iter(
            zip(indices.tolist(), [None] * len(indices) if labels is None else labels.tolist(), strict=True)
        )

        def rows(batch: Sequence[Future[bytes]]) -> Iterator[Row]:
            for future in batch:
                index, label = next(numbers)
                yield Row(index, label, future.result())
            self._count(len(batch))

        for images in self._images(indices, labels):
            waiting.append([self._encoders.submit(encode, image) for image in images])
            if len(waiting) > BATCHES_AHEAD:
                yield from rows(waiting.popleft())
        while waiting:
            yield from rows(waiting.popleft())

    def _images(self, indices: NDArray[np.int64], labels: NDArray[np.int64] | None) -> Iterator[Tensor]:
        """uint8 images, or samples where the format stores these, in batches of the plan's size at most.

        Decoded images come a few at a time, so that they are encoded while the next ones are decoded, also the last ones of a part.
        """
        settings, generator = self._plan.settings, self._generator
        chosen = None if labels is None else torch.from_numpy(labels)
        samples = generator.samples(
            torch.from_numpy(indices), chosen, int(settings["seed"]), int(settings["steps"])
        )
        for batch in regrouped(samples, self._plan.batch):
            if self._plan.format.stores_latents:
                yield batch
                continue
            together = len(batch) if generator.decoder is None else DECODED_AT_ONCE
            for piece in batch.split(together):
                yield to_uint8(require_finite(decode_samples(piece, generator.decoder)))

    def _manifest_rows(
        self,
        part: int,
        indices: NDArray[np.int64],
        labels: NDArray[np.int64] | None,
        digests: Sequence[str],
    ) -> pa.Table:
        plan, count = self._plan, len(indices)
        listed = [None] * count if labels is None else labels.tolist()
        names = plan.class_names
        classes = [names[label] if names and label is not None else None for label in listed]
        if isinstance(plan.format, PngFormat):
            files = [name for _, name in plan.image_names(part)]
            keys = [name.removesuffix(".png") for name in files]
        elif isinstance(plan.format, NpzFormat):
            files = [NPZ_NAME] * count
            first = part * int(plan.settings["per_part"])
            keys = [str(first + position) for position in range(count)]
        else:
            files = [plan.format.part_name(part)] * count
            keys = [sample_key(index) for index in indices.tolist()]
        seeds = [int(plan.settings["seed"])] * count
        columns = [indices.tolist(), listed, classes, seeds, files, keys, list(digests)]
        arrays = [pa.array(c, field.type) for c, field in zip(columns, MANIFEST_SCHEMA, strict=True)]
        return pa.table(arrays, schema=MANIFEST_SCHEMA)

    def _publish_record(self, part: int, table: pa.Table, files: Sequence[PartFile]) -> None:
        content = record_bytes(table, files)
        name = self._plan.record_name(part)
        through_outages(self._store, f"writing {name}", lambda: self._store.write(name, content))


def regrouped(batches: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The rows of batches in batches of `size`, the last one smaller."""
    held = None
    for batch in batches:
        held = batch if held is None else torch.cat([held, batch])
        while len(held) >= size:
            yield held[:size]
            held = held[size:]
    if held is not None and len(held):
        yield held


def record_bytes(table: pa.Table, files: Sequence[PartFile]) -> bytes:
    """Rows of a manifest with their files, as Parquet."""
    listed = {file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files}
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({FILES_KEY: json.dumps(listed)}), buffer)
    return buffer.getvalue()


def files_of(table: pa.Table) -> dict[str, PartFile]:
    """The files that a record or a manifest lists. Raises ValueError where the list is damaged."""
    listed = parse_json((table.schema.metadata or {}).get(FILES_KEY.encode(), b"{}"))
    try:
        return {
            name: PartFile(name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()
        }
    except (TypeError, KeyError, AttributeError):
        raise ValueError("the list of its files is damaged") from None
