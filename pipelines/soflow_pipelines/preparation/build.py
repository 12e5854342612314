"""soflow_pipelines.preparation.build"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.images.decode import ImageError
from soflow_pipelines.preparation.shard_plan import DamagedImages, Encoder, Preparation
from soflow_pipelines.preparation.state import NOTES, _note, _note_name, finish, only_one, start
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.tables import StagingFolder, read_info
from soflow_pipelines.shards.writer import Sample, shard_name, write_shard
from soflow_pipelines.storage.object_store import ObjectStore

LOOKAHEAD = 2  # batches decoded while one is encoded


def build_shard(
    plan: Preparation,
    shard: int,
    storage: ObjectStore,
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


def prepare_here(
    plan: Preparation,
    storage: ObjectStore,
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
