"""Builds the shards of a plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from soflow_core.failures import InputError
from soflow_pipelines.images.codec import Encoder
from soflow_pipelines.images.convert import to_unit_range
from soflow_pipelines.images.decode import ImageError
from soflow_pipelines.preparation.shard_plan import ShardPlan
from soflow_pipelines.preparation.state import (
    STATE_FOLDER,
    BuiltShard,
    begin,
    exclusive,
    finish,
    record_built,
)
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.tables import ShardRecord, read_info
from soflow_pipelines.shards.writer import ShardWriter, open_shard, shard_name
from soflow_pipelines.storage.object_store import ObjectStore
from soflow_pipelines.storage.opening import staging_folder

LARGER = {"float16": ": --dtype float32 holds larger numbers"}
"""What to do where a type is too small."""
LOOKAHEAD = 2
"""Batches that are decoded while one is encoded."""

Decoded: TypeAlias = NDArray[Any] | ImageError
"""The pixels of a sample, or its moments where the source holds latents, or why they cannot be read."""


class DamagedImages(InputError):
    """Images of a shard that cannot be used."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__(*errors)
        self.errors = errors
        """One line for each image: its name and what is wrong."""


@dataclass(frozen=True)
class ShardBuilder:
    """Builds shards of a plan and publishes them to a store; the bytes do not depend on `threads`."""

    plan: ShardPlan
    store: ObjectStore
    encoder: Encoder | None = None
    """None for pixels, and for a source of latents."""
    threads: int = 1
    """Threads that decode while a batch is encoded."""
    on_images: Callable[[int], None] | None = None
    """Called with the number of images done, and with minus that of the shard's where the shard fails."""

    def build(self, shard: int) -> BuiltShard:
        """Builds, publishes and records one shard.

        Raises DamagedImages with all of the shard's, unless they are to be skipped; StorageError, OSError.
        """
        with staging_folder(self.store, STATE_FOLDER) as staging:
            local = staging / shard_name(shard)
            damaged: list[str] = []
            with open_shard(self.store, local, shard, self.plan.info) as writer:
                for batch, decoded in self._decoded(shard):
                    damaged += [str(pixels) for pixels in decoded if isinstance(pixels, ImageError)]
                    if self.plan.settings.skip_damaged or not damaged:
                        damaged += self._add(writer, batch, decoded)
                    self._count(len(batch))
                if damaged and not self.plan.settings.skip_damaged:
                    self._count(-len(self.plan.shard_samples(shard)))
                    raise DamagedImages(damaged)
                record: ShardRecord = writer.finish()
            self.store.publish(record.name, local)
        built = BuiltShard(record, tuple(damaged))
        record_built(self.store, shard, built)
        return built

    def _count(self, images: int) -> None:
        if self.on_images is not None:
            self.on_images(images)

    def _add(self, writer: ShardWriter, batch: range, decoded: list[Decoded]) -> list[str]:
        """Encodes the usable samples of a batch and writes them; what is wrong with those that it leaves out."""
        usable = [
            (number, pixels)
            for number, pixels in zip(batch, decoded, strict=True)
            if not isinstance(pixels, ImageError)
        ]
        if not usable:
            return []
        arrays: Sequence[NDArray[Any]] = [pixels for _, pixels in usable]
        if self.plan.encoded is not None:
            arrays = [self._stored(moments) for moments in arrays]
        elif self.encoder is not None:
            moments = self.encoder.encode(to_unit_range(torch.from_numpy(np.stack(arrays))))
            arrays = list(self._stored(moments.numpy()))
        left_out: list[str] = []
        for (number, _), array in zip(usable, arrays, strict=True):
            if array.dtype.kind != "f" or np.isfinite(array).all():
                writer.add(self.plan.sample(number, array))
            else:
                name = self.plan.source.item_name(self.plan.place(number)[0])
                left_out.append(
                    f"{name}: its latent is not finite in {array.dtype}{LARGER.get(str(array.dtype), '')}."
                )
        return left_out

    def _stored(self, moments: NDArray[Any]) -> NDArray[Any]:
        """Moments in the type in which they are stored; what is beyond it becomes infinite."""
        with np.errstate(over="ignore"):
            return moments.astype(self.plan.info.dtype)

    def _decoded(self, shard: int) -> Iterator[tuple[range, list[Decoded]]]:
        """Batches of a shard's sample numbers with their decoded images, `threads` + LOOKAHEAD of them in work."""
        numbers, size = self.plan.shard_samples(shard), self.plan.settings.batch
        pending: deque[tuple[range, Future[list[Decoded]]]] = deque()
        with ThreadPoolExecutor(self.threads, "decode") as pool:
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                pending.append((batch, pool.submit(self._decode, batch)))
                if len(pending) >= self.threads + LOOKAHEAD:
                    ready, future = pending.popleft()
                    yield ready, future.result()
            while pending:
                ready, future = pending.popleft()
                yield ready, future.result()

    def _decode(self, batch: range) -> list[Decoded]:
        return [self._array(number) for number in batch]

    def _array(self, number: int) -> Decoded:
        try:
            return self.plan.array(number)
        except ImageError as error:
            return error


def prepare_locally(
    plan: ShardPlan, store: ObjectStore, encoder: Encoder | None = None, threads: int = 1
) -> DatasetInfo:
    """Builds all shards that are missing in this process, without Ray, and returns the description of the set.

    `soflowctl data prepare` does the same on a cluster, with the same bytes. Raises ShardError, StorageError, and
    DamagedImages of the first shard that has some.
    """
    with exclusive(store):
        pending = begin(plan, store)
        if pending is None:
            return read_info(store.uri)
        builder = ShardBuilder(plan, store, encoder, threads)
        for shard in pending:
            builder.build(shard)
        return finish(plan, store)
