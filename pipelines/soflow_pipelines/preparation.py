"""From a source of images to a shard set, one shard at a time, so that the work can be spread and resumed.

What each shard holds is a function of the source and the settings. A shard is built by one worker,
published complete, and noted in `.preparing/`; a preparation that was cut builds the shards that are not
noted, and its bytes are those of one that was not cut.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from soflow_pipelines.autoencoders import AutoencoderFacts
from soflow_pipelines.dataset_info import INFO_NAME, DatasetInfo, ShardError
from soflow_pipelines.images import ImageError, centre_crop, to_array, to_unit_range
from soflow_pipelines.order import philox_permutation
from soflow_pipelines.shards import (
    SHARD_BYTES,
    Sample,
    ShardRecord,
    StagingFolder,
    publish_set,
    read_info,
    samples_per_shard,
    shard_name,
    write_shard,
)
from soflow_pipelines.sources import Source
from soflow_pipelines.storage import LocalFolder, Storage

NOTES = ".preparing"
PLAN_NAME = f"{NOTES}/plan.json"
LOOKAHEAD = 2  # batches decoded while one is encoded


class DamagedImages(Exception):
    """Images of a shard that cannot be used, each with its name and what is wrong."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(*errors)
        self.errors = errors


class Encoder(Protocol):
    """Images to latents; an autoencoder."""

    def encode(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the bytes of the shards, beside the source and the autoencoder."""

    resolution: int  # pixels of a side
    flips: bool = False  # each image a second time, mirrored before it is encoded
    dtype: Literal["float16", "float32"] = "float16"  # of latents
    seed: int = 0  # of the order in which images are dealt to shards
    shard_bytes: int = SHARD_BYTES
    batch: int = 32  # images encoded at once; rounding may depend on it
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.shard_bytes < 1 or self.batch < 1:
            raise ValueError("resolution, bytes of a shard and batch are 1 or more")


class Preparation:
    """The plan: which images make which shard."""

    def __init__(
        self, source: Source, settings: PrepareSettings, autoencoder: AutoencoderFacts | None = None
    ) -> None:
        self.source = source
        self.settings = settings
        self.autoencoder = autoencoder
        size = settings.resolution
        if autoencoder is None:
            shape = (source.channels, size, size)
        else:
            if source.channels != 3:
                raise ValueError(
                    f"{autoencoder.id} encodes RGB images; {source.name} has {source.channels} channel."
                )
            if size % autoencoder.factor:
                raise ValueError(
                    f"a resolution of {size} is no multiple of {autoencoder.factor}, as {autoencoder.id} needs."
                )
            shape = (autoencoder.channels, size // autoencoder.factor, size // autoencoder.factor)
        self.info = DatasetInfo(
            kind="pixels" if autoencoder is None else "latents",
            shape=shape,
            dtype="uint8" if autoencoder is None else settings.dtype,
            classes=None if source.labels is None else len(source.class_names),
            class_names=source.class_names,
            resolution=size,
            crop="adm-centre",
            flips=settings.flips,
            autoencoder=autoencoder.id if autoencoder else None,
            autoencoder_digest=autoencoder.digest if autoencoder else None,
            scaling=autoencoder.scaling if autoencoder else 1.0,
            shift=autoencoder.shift if autoencoder else 0.0,
            recipe=self.recipe(),
        )
        self.samples = len(source) * (2 if settings.flips else 1)
        self._per_shard = samples_per_shard(self.info, self.samples, settings.shard_bytes)
        self._dealt = self._deal()

    def recipe(self) -> dict[str, Any]:
        """All that decides the bytes, as it stands in `dataset.json`."""
        return {
            "source": self.source.name,
            "images": len(self.source),
            "source_digest": self.source.digest,
            **asdict(self.settings),
            "autoencoder": self.autoencoder.id if self.autoencoder else None,
            "autoencoder_digest": self.autoencoder.digest if self.autoencoder else None,
        }

    def _deal(self) -> NDArray[np.int64]:
        """The images in the order in which they fill the shards: permuted, so that each shard has all classes.

        Where images are cheap only when read in blocks, blocks are permuted instead of images.
        """
        seed, ends = self.settings.seed, self.source.block_ends
        if ends is None:
            return philox_permutation(len(self.source), seed, 0, stream=0)
        starts = np.concatenate([[0], ends[:-1]])
        blocks = philox_permutation(len(ends), seed, 0, stream=0)
        return np.concatenate([np.arange(starts[block], ends[block]) for block in blocks])

    @property
    def shards(self) -> int:
        return -(-self.samples // self._per_shard)

    def shard_samples(self, shard: int) -> range:
        """The numbers of a shard's samples in the dealt order."""
        return range(shard * self._per_shard, min((shard + 1) * self._per_shard, self.samples))

    def place(self, sample: int) -> tuple[int, bool]:
        """(item of the source, mirrored) of a sample of the dealt order."""
        if self.settings.flips:
            return int(self._dealt[sample // 2]), bool(sample % 2)
        return int(self._dealt[sample]), False

    def pixels(self, sample: int) -> NDArray[np.uint8]:
        """uint8 (C, H, W) of a sample, cropped and, where it is its turn, mirrored. ImageError."""
        item, mirrored = self.place(sample)
        image = centre_crop(self.source.image(item), self.settings.resolution)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_array(image)

    def sample(self, sample: int, array: NDArray[Any]) -> Sample:
        item, mirrored = self.place(sample)
        label = None if self.source.labels is None else int(self.source.labels[item])
        return Sample(f"{item:08d}-flip" if mirrored else f"{item:08d}", array, label)


def build_shard(
    plan: Preparation,
    shard: int,
    storage: Storage,
    encoder: Encoder | None,
    threads: int = 1,
    on_images: Callable[[int], None] | None = None,
) -> None:
    """Builds one shard, publishes and notes it. DamagedImages, naming all of the shard's, unless they are skipped.

    `threads` decode ahead while a batch is encoded; the bytes do not depend on them.
    """
    left_out: list[str] = []
    samples = _encoded(plan, shard, encoder, threads, left_out, on_images)
    with StagingFolder(storage, NOTES) as staging:
        local = staging / shard_name(shard)
        try:
            record = write_shard(local, shard, samples, plan.info)
        except DamagedImages:
            if on_images is not None:
                on_images(-len(plan.shard_samples(shard)))
            raise
        storage.publish(record.name, local)
    storage.write(_note_name(shard), _note(record, left_out))


def _encoded(
    plan: Preparation,
    shard: int,
    encoder: Encoder | None,
    threads: int,
    left_out: list[str],
    on_images: Callable[[int], None] | None,
) -> Iterator[Sample]:
    """The shard's samples in order. Damaged images are gathered in `left_out`; raised at the end unless skipped."""
    for numbers, decoded in _decoded(plan, shard, threads):
        good = []
        for number, pixels in zip(numbers, decoded, strict=True):
            if isinstance(pixels, ImageError):
                left_out.append(str(pixels))
            else:
                good.append((number, pixels))
        keep = good and (plan.settings.skip_damaged or not left_out)
        if keep:
            stacked = np.stack([pixels for _, pixels in good])
            arrays: NDArray[Any] = stacked
            if encoder is not None:
                moments = encoder.encode(to_unit_range(torch.from_numpy(stacked)))
                arrays = moments.numpy().astype(plan.info.dtype)
            for (number, _), array in zip(good, arrays, strict=True):
                yield plan.sample(number, array)
        if on_images is not None:
            on_images(len(numbers))
    if left_out and not plan.settings.skip_damaged:
        raise DamagedImages(left_out)


def _decoded(
    plan: Preparation, shard: int, threads: int
) -> Iterator[tuple[range, list[NDArray[np.uint8] | ImageError]]]:
    """Batches of decoded images; each thread has one in hand and LOOKAHEAD more are ahead of what is taken."""

    def decode(number: int) -> NDArray[np.uint8] | ImageError:
        try:
            return plan.pixels(number)
        except ImageError as error:
            return error

    def decode_all(batch: range) -> list[NDArray[np.uint8] | ImageError]:
        return [decode(number) for number in batch]

    numbers, size = plan.shard_samples(shard), plan.settings.batch
    waiting: deque[tuple[range, Future[list[NDArray[np.uint8] | ImageError]]]] = deque()
    with ThreadPoolExecutor(threads, "decode") as pool:
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            waiting.append((batch, pool.submit(decode_all, batch)))
            if len(waiting) >= threads + LOOKAHEAD:
                ready, future = waiting.popleft()
                yield ready, future.result()
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()


def _note_name(shard: int) -> str:
    return f"{NOTES}/{shard_name(shard)}.parquet"


def _note(record: ShardRecord, left_out: list[str]) -> bytes:
    assert record.index is not None
    facts = {**asdict(replace(record, index=None)), "left_out": left_out}
    buffer = io.BytesIO()
    pq.write_table(record.index.replace_schema_metadata({"record": json.dumps(facts)}), buffer)
    return buffer.getvalue()


def _read_note(storage: Storage, shard: int) -> tuple[ShardRecord, list[str]]:
    table = pq.read_table(io.BytesIO(storage.read(_note_name(shard))))
    facts = json.loads(table.schema.metadata[b"record"])
    left_out = facts.pop("left_out")
    facts["label_counts"] = {int(label): count for label, count in facts["label_counts"].items()}
    return ShardRecord(**{**facts, "index": table.replace_schema_metadata(None)}), left_out


def start(plan: Preparation, storage: Storage) -> list[int] | None:
    """The shards that are still to be built; None where the set is complete already.

    ShardError where the place holds something else, naming what differs.
    """
    if storage.size(INFO_NAME) is not None:
        _check_same(plan.recipe(), dict(read_info(storage.uri).recipe), f"{storage.uri} holds a finished set")
        clear_notes(storage)
        return None
    names = storage.names()
    if PLAN_NAME in names:
        _check_same(
            plan.recipe(), json.loads(storage.read(PLAN_NAME)), f"{storage.uri} holds an unfinished set"
        )
    elif foreign := [name for name in names if not name.startswith(f"{NOTES}/")]:
        raise ShardError(f"{storage.uri} is not empty: it holds {foreign[0]}; name another place.")
    else:
        storage.write(PLAN_NAME, json.dumps(plan.recipe(), indent=2).encode())
    present = set(names)
    # A note without its shard is what is left when someone removed the shard.
    return [s for s in range(plan.shards) if _note_name(s) not in present or shard_name(s) not in present]


def _check_same(wanted: dict[str, Any], found: dict[str, Any], what: str) -> None:
    if found == json.loads(json.dumps(wanted)):
        return
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    said = ", ".join(
        f"{name} {_short(found.get(name))} instead of {_short(wanted[name])}" for name in differing
    )
    raise ShardError(
        f"{what} of other settings ({said or 'of another version'}); name another place or remove it."
    )


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 40 else repr(value)


def finish(plan: Preparation, storage: Storage) -> DatasetInfo:
    """Writes index, manifest and `dataset.json` when every shard is there."""
    notes = [_read_note(storage, shard) for shard in range(plan.shards)]
    left_out = tuple(sorted(name for _, names in notes for name in names))
    info = publish_set(storage, replace(plan.info, left_out=left_out), [record for record, _ in notes])
    clear_notes(storage)
    return info


def clear_notes(storage: Storage) -> None:
    """Removes the notes, and what a killed worker left beside them."""
    if isinstance(storage, LocalFolder):
        shutil.rmtree(storage.path(NOTES), ignore_errors=True)
        return
    for name in storage.names():
        if name.startswith(f"{NOTES}/"):
            storage.remove(name)


@contextmanager
def only_one(storage: Storage) -> Iterator[None]:
    """Keeps a second preparation on this machine out of the same place. ShardError where one is at work."""
    place = hashlib.sha256(str(getattr(storage, "folder", storage.uri)).encode()).hexdigest()[:16]
    lock = Path(tempfile.gettempdir(), f"soflow-{os.getuid()}-{place}.lock")
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{storage.uri} is being prepared by another process on this machine.") from None
        yield


def prepare_here(
    plan: Preparation,
    storage: Storage,
    encoder: Encoder | None,
    threads: int = 1,
    on_images: Callable[[int], None] | None = None,
) -> DatasetInfo:
    """The whole preparation in this process. ShardError, DamagedImages of the first shard that has some."""
    with only_one(storage):
        todo = start(plan, storage)
        if todo is None:
            return read_info(storage.uri)
        for shard in todo:
            build_shard(plan, shard, storage, encoder, threads, on_images)
        return finish(plan, storage)
