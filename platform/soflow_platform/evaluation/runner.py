"""Statistics runners: compute the missing blocks of statistics jobs, on a Ray cluster or in this process."""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.metrics.score_statistics import ScoreStatistics
from soflow_pipelines.references.statistics_job import OpenedImages, StatisticsJob, compute_block
from soflow_platform.cluster.actor_pool import (
    ActorPool,
    Progress,
    Report,
    deterministic_torch,
    no_report,
    one_cpu,
    raise_failure,
)
from soflow_platform.cluster.connection import RAY_START_SECONDS, Cluster, connected
from soflow_platform.errors import UserError
from soflow_platform.evaluation.block_store import BlockStore
from soflow_platform.evaluation.feature_networks import best_device, feature_network
from soflow_platform.storage.project import ProjectFolder

if TYPE_CHECKING:
    from typing_extensions import Self

Block = tuple[BlockStore, int]

RESUME_HINT = "Finished blocks are kept"


class StatisticsRunner(ABC):
    """Computes statistics jobs in blocks that are kept in the project folder, so that an interrupted command goes on."""

    def __init__(self, storage: ProjectFolder, report: Report = no_report) -> None:
        self.storage, self.report = storage, report

    def folder(self, job: StatisticsJob) -> BlockStore:
        """The block files of a job."""
        return BlockStore.of(job, self.storage.root / "evaluations")

    def one(self, job: StatisticsJob) -> ScoreStatistics:
        """The statistics of a single job."""
        return self.statistics([job])[0]

    def statistics(self, jobs: Sequence[StatisticsJob]) -> list[ScoreStatistics]:
        """The statistics of each job. Raises InputError where an image or a setting is refused, JobError where a block failed."""
        stores = [self.folder(job) for job in jobs]
        missing = {store.folder: (store, store.missing()) for store in stores}
        blocks = [(store, block) for store, numbers in missing.values() for block in numbers]
        if blocks:
            self._compute(blocks, sum(store.job.images.count for store, _ in missing.values()))
        return [store.whole() for store in stores]

    def _compute(self, blocks: list[Block], total: int) -> None:
        left = Counter(store.folder for store, _ in blocks)
        start = Progress(total - sum(store.job.size(block) for store, block in blocks), total)
        for store, _ in self._computed(blocks, start):
            left[store.folder] -= 1
            if not left[store.folder]:
                # Merge at once: the blocks of a large job take gigabytes, the merged statistics as much as one of them.
                store.whole()
        self.report(Progress(total, total))

    @abstractmethod
    def _computed(self, blocks: list[Block], start: Progress) -> Iterator[Block]:
        """Compute and publish every block, and yield it as it is done."""


class LocalStatisticsRunner(StatisticsRunner):
    """Computes statistics in this process."""

    def _computed(self, blocks: list[Block], start: Progress) -> Iterator[Block]:
        computer, done = BlockComputer(self.storage, best_device()), start.done
        for store, block in blocks:
            computer.compute(store, block)
            done += store.job.size(block)
            self.report(Progress(done, start.total))
            yield store, block


class RayStatisticsRunner(StatisticsRunner):
    """Computes statistics on a Ray cluster, to which it connects when a block is missing, at most once.

    A caller that is connected already passes its `cluster`. Without that and without an address, this process begins, and Ray is
    started on this machine only where work is left after the seconds that its start takes. Where a GPU is, Ray is started at once.
    """

    def __init__(
        self,
        storage: ProjectFolder,
        address: str | None = None,
        report: Report = no_report,
        cluster: Cluster | None = None,
    ) -> None:
        super().__init__(storage, report)
        self._address, self._cluster = address, cluster
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _computed(self, blocks: list[Block], start: Progress) -> Iterator[Block]:
        if self._cluster is None and self._address is None and not torch.cuda.is_available():
            blocks = yield from self._begun_here(blocks, start)
            if not blocks:
                return
            start = Progress(start.total - sum(store.job.size(block) for store, block in blocks), start.total)
        if self._cluster is None:
            self._cluster = self._stack.enter_context(connected(self._address))
        pool: ActorPool[Block] = ActorPool(
            self._cluster,
            StatisticsActor,
            (str(self.storage.root),),
            describe=describe_block,
            resume_hint=RESUME_HINT,
        )
        for task, _ in pool.imap_unordered(blocks, start, self.report):
            yield task

    def _begun_here(self, blocks: list[Block], start: Progress) -> Generator[Block, None, list[Block]]:
        """Compute blocks in this process, as an actor does, for as long as a start of Ray takes.

        Yields each as it is done; returns those that are left. Raises InputError and JobError as the pool of actors does.
        """
        done, end, left = start.done, time.monotonic() + RAY_START_SECONDS, list(blocks)

        def count(images: int) -> None:
            nonlocal done
            done += images
            self.report(Progress(done, start.total))
            if time.monotonic() > end:
                raise _TimeUp

        computer = BlockComputer(self.storage, "cpu", count)
        while left and time.monotonic() < end:
            store, block = left[0]
            try:
                with one_cpu():
                    computer.compute(store, block)
            except _TimeUp:
                break
            except Exception as error:
                raise_failure(describe_block(left[0]), RESUME_HINT, error)
            left.pop(0)
            yield store, block
        return left


def describe_block(task: Block) -> str:
    """A block, for a person."""
    store, block = task
    return f"block {block} of {store.folder.name}"


class _TimeUp(Exception):
    """This process has begun for long enough; the block that it was at is computed by Ray."""


class StatisticsActor:
    """Actor that computes and publishes blocks on one machine of a cluster."""

    def __init__(self, storage: str, threads: int, count: Callable[[int], None]) -> None:
        device = deterministic_torch(threads)
        self._computer = BlockComputer(ProjectFolder(Path(storage)), device, count)

    def run(self, task: Block) -> None:
        """Compute a block and publish it."""
        self._computer.compute(*task)


class BlockComputer:
    """Computes blocks. Feature networks, and the images of the last job, stay open for the next block."""

    def __init__(
        self, storage: ProjectFolder, device: str | torch.device, count: Callable[[int], None] | None = None
    ) -> None:
        self._storage, self._device, self._count = storage, device, count
        self._networks: dict[str, FeatureNetwork] = {}
        self._opened: tuple[str, OpenedImages] | None = None

    def compute(self, store: BlockStore, block: int) -> None:
        """Compute a block and publish it. Raises InputError where this machine has other feature weights than the job names."""
        network = self._network(store.job)
        statistics = compute_block(store.job, block, self._images(store.job), network, self._count)
        store.publish(block, statistics)

    def _images(self, job: StatisticsJob) -> OpenedImages:
        if self._opened is None or self._opened[0] != job.key:
            if self._opened is not None:
                self._opened[1].close()
            # Keep one network at a time, because they may be large.
            self._opened = None
            self._opened = job.key, job.images.open(self._device)
        return self._opened[1]

    def _network(self, job: StatisticsJob) -> FeatureNetwork:
        if job.features not in self._networks:
            self._networks[job.features] = feature_network(job.features, job.shape, self._storage)
        network = self._networks[job.features]
        if network.id != job.features_id:
            raise UserError(
                f"this machine has {network.id} where the command found {job.features_id}: give every machine the same weights."
            )
        return network
