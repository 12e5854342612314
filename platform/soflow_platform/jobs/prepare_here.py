"""Builds shards on threads of this process, where that is sooner done than by a Ray that has to be started first."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch

from soflow_pipelines.images.codec import Autoencoder
from soflow_pipelines.preparation.build import DamagedImages, ShardBuilder
from soflow_pipelines.preparation.shard_plan import ShardPlan
from soflow_pipelines.preparation.state import BuiltShard
from soflow_pipelines.storage.object_store import ObjectStore
from soflow_platform.cluster.actor_pool import Progress, Report, one_cpu, raise_failure
from soflow_platform.cluster.connection import RAY_START_SECONDS

MOST_THREADS = 4
"""Threads that build shards at once. A part of the work holds Python's lock, so that many more would wait for each other."""
LONGEST_SECONDS = 60.0
"""Longer work is Ray's: its start counts little there, and a shard whose worker dies is built by another one."""
LOOK_SECONDS = 1.0
"""How long the rate of images is observed before the time that is left is estimated from it."""
POLL_SECONDS = 0.1


@dataclass
class HereResult:
    """What became of the shards that were to be built."""

    left: list[int] = field(default_factory=list)
    """Shards that are not built, because that would take longer here than on a Ray."""
    damaged: list[str] = field(default_factory=list)
    """Damaged images of the others, each with what is wrong."""


class _TimeUp(Exception):
    """This process has begun a shard that it leaves to Ray."""


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def longest_here(cores: int, threads: int) -> float:
    """Seconds of work on `threads` of a machine's `cores` up to which this process begins no Ray.

    A Ray takes its start and then threads / cores of the seconds.
    """
    spare = 1 - threads / cores
    return min(LONGEST_SECONDS, RAY_START_SECONDS / spare) if spare > 0 else LONGEST_SECONDS


def build_here(
    plan: ShardPlan,
    store: ObjectStore,
    encoder: Autoencoder | None,
    pending: Sequence[int],
    report: Report,
) -> HereResult:
    """Builds shards, with the bytes that an actor makes, unless too much is left after the first second.

    Raises InputError and JobError as the pool of actors does.
    """
    with one_cpu():
        return _Builders(plan, store, encoder, list(pending), report).run()


class _Builders:
    """Threads that build one shard each at a time, and what they have done."""

    def __init__(
        self,
        plan: ShardPlan,
        store: ObjectStore,
        encoder: Autoencoder | None,
        pending: list[int],
        report: Report,
    ) -> None:
        self._plan, self._encoder, self._pending, self._report = plan, encoder, pending, report
        cores = usable_cores()
        self._threads = min(len(pending), cores, MOST_THREADS)
        self._limit = longest_here(cores, self._threads)
        self._images = sum(len(plan.shard_samples(shard)) for shard in pending)
        self._builder = ShardBuilder(plan, store, encoder, 1, self._count)
        self._done, self._lock, self._stop = 0, threading.Lock(), threading.Event()

    def run(self) -> HereResult:
        if self._encoder is not None and self._encoding_seconds(self._encoder) > self._limit:
            return HereResult(left=self._pending)
        result, began = HereResult(), time.monotonic()
        with ThreadPoolExecutor(self._threads, "build") as pool:
            shards = {pool.submit(self._builder.build, shard): shard for shard in self._pending}
            waiting = set(shards)
            try:
                while waiting:
                    finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                    self._report(Progress(self._plan.samples - self._images + self._done, self._plan.samples))
                    for future in finished:
                        self._take(future, shards[future], result)
                    if waiting and not self._stop.is_set() and self._too_long(time.monotonic() - began):
                        self._end(shards)
            except BaseException:
                self._end(shards)
                raise
        result.left.sort()
        return result

    def _count(self, images: int) -> None:
        with self._lock:
            self._done += images
        if self._stop.is_set():
            raise _TimeUp

    def _take(self, future: Future[BuiltShard], shard: int, result: HereResult) -> None:
        if future.cancelled():
            result.left.append(shard)
            return
        error = future.exception()
        if isinstance(error, _TimeUp):
            result.left.append(shard)
        elif isinstance(error, DamagedImages):
            result.damaged += error.errors
        elif error is not None:
            raise_failure(f"shard {shard}", "Finished shards are kept", error)

    def _end(self, futures: dict[Future[BuiltShard], int]) -> None:
        """Has the threads stop at their next batch."""
        self._stop.set()
        for future in futures:
            future.cancel()

    def _too_long(self, elapsed: float) -> bool:
        """Whether the rest would take longer than the limit at the rate until now."""
        if elapsed < LOOK_SECONDS or (self._done <= 0 and elapsed < RAY_START_SECONDS):
            return False
        return self._done <= 0 or elapsed / self._done * (self._images - self._done) > self._limit

    def _encoding_seconds(self, encoder: Autoencoder) -> float:
        """Estimate for all images, from one: a thread that encodes can only stop between batches."""
        side = self._plan.settings.resolution
        began = time.monotonic()
        encoder.encode(torch.zeros(1, 3, side, side))
        return (time.monotonic() - began) * self._images / self._threads
