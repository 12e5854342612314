"""Gathering statistics of images on all machines of a Ray cluster, block by block."""

from __future__ import annotations

import contextlib
from collections import Counter as Counted
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from soflow_core.failures import summarize
from soflow_pipelines.images.decode import ImageError
from soflow_pipelines.metrics import ScoreError, ScoreStatistics
from soflow_pipelines.shards.info import ShardError
from soflow_pipelines.sources.source import SourceError
from soflow_pipelines.storage.object_store import StorageError
from soflow_platform.cluster.actor_pool import CallbackActorPool as ActorPool
from soflow_platform.cluster.actor_pool import (
    Progress,
    Report,
    TaskError,
    new_counter,
    read_counter,
    share_cluster,
)
from soflow_platform.cluster.actor_pool import no_report as silent
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.errors import JobError, UserError
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.evaluation.statistics import BlockStore, StatisticsJob, compute_block
from soflow_platform.storage.project import ProjectFolder

INPUT_ERRORS = (UserError, ScoreError, SourceError, ShardError, StorageError, ImageError)
"""What a user can mend; the text is a sentence."""


class StatisticsActor:
    """An actor that makes blocks of measurements. Networks stay open from block to block."""

    def __init__(self, storage: str, evaluations: str, threads: int, counter: Any) -> None:
        import torch

        # One thread and deterministic kernels: a block that is made again is the same to the last bit.
        torch.set_num_threads(threads if torch.cuda.is_available() else 1)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        # Images are made and decoded in float32, as features are: TF32 moves them from one kind of GPU to another.
        torch.backends.cudnn.allow_tf32 = False
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._storage, self._evaluations = ProjectFolder(Path(storage)), Path(evaluations)
        self._counter = counter
        self._networks: dict[str, Any] = {}
        self._opened: tuple[str, Any] = ("", None)

    def make(self, measurement: StatisticsJob, block: int) -> None:
        """Make and publish a block."""
        network = self._network(measurement)
        if self._opened[0] != measurement.key:
            # One at a time: networks may be large.
            self._opened = ("", None)
            self._opened = (measurement.key, measurement.images.open(self._device))
        statistics = compute_block(measurement, block, self._opened[1], network, self._count)
        BlockStore.of(measurement, self._evaluations).publish(block, statistics)

    def _network(self, measurement: StatisticsJob) -> Any:
        if measurement.features not in self._networks:
            found = feature_network(measurement.features, measurement.shape, self._storage)
            self._networks[measurement.features] = found
        network = self._networks[measurement.features]
        if network.id != measurement.features_id:
            raise UserError(
                f"this machine has {network.id} where the command found {measurement.features_id}: give every machine the same weights."
            )
        return network

    def _count(self, images: int) -> None:
        self._counter.add.remote(images)


class RayStatisticsRunner:
    """Makes what is missing of measurements; a Ray is connected to when there is something to make, and once.

    A caller that is connected already gives its `cluster`.
    """

    def __init__(
        self,
        storage: ProjectFolder,
        address: str | None = None,
        report: Report = silent,
        cluster: Cluster | None = None,
    ) -> None:
        self._storage, self._address, self._report = storage, address, report
        self._root = storage.root / "evaluations"
        self._stack = contextlib.ExitStack()
        self._cluster = cluster

    def __enter__(self) -> RayStatisticsRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def folder(self, measurement: StatisticsJob) -> BlockStore:
        """Where a measurement is kept."""
        return BlockStore.of(measurement, self._root)

    def one(self, measurement: StatisticsJob) -> ScoreStatistics:
        """The whole statistics of a single measurement."""
        return self.statistics([measurement])[0]

    def statistics(self, measurements: Sequence[StatisticsJob]) -> list[ScoreStatistics]:
        """The whole statistics of each. Raises UserError for what is refused, JobError for what failed."""
        folders = [self.folder(measurement) for measurement in measurements]
        missing = {folder.folder: (folder, folder.missing()) for folder in folders}
        todo = [(folder, block) for folder, blocks in missing.values() for block in blocks]
        if todo:
            self._make(todo, sum(folder.measurement.images.count for folder, _ in missing.values()))
        return [folder.whole() for folder in folders]

    def _make(self, todo: list[tuple[BlockStore, int]], total: int) -> None:
        import ray

        if self._cluster is None:
            self._cluster = self._stack.enter_context(connected(self._address))
        share = share_cluster(self._cluster, len(todo), uses_gpu=True)
        counter = new_counter()

        def new_actor() -> Any:
            actor = ray.remote(StatisticsActor).options(num_cpus=share.cpus, num_gpus=share.gpus)
            return actor.remote(str(self._storage.root), str(self._root), share.threads, counter)

        spread: ActorPool[tuple[BlockStore, int]] = ActorPool(
            new_actor,
            start=lambda actor, task: actor.make.remote(task[0].measurement, task[1]),
            named=lambda task: f"block {task[1]} of {task[0].folder.name}",
            kept="Finished blocks are kept",
            cluster=self._cluster,
        )
        done = total - sum(folder.measurement.size(block) for folder, block in todo)
        made = 0
        left = Counted(folder.folder for folder, _ in todo)
        try:
            for finished in spread.run(todo, share.actors):
                if finished is not None:
                    folder = finished[0][0]
                    left[folder.folder] -= 1
                    if not left[folder.folder]:
                        # At once: the blocks of a large measurement take gigabytes, the whole takes as much as one of them.
                        folder.whole()
                made = read_counter(counter, made)
                self._report(Progress(min(total, done + made), total))
        except TaskError as error:
            if isinstance(error.cause, INPUT_ERRORS):
                raise UserError(str(error.cause)) from error
            raise JobError(
                f"{spread.named(error.task)} failed: {summarize(error.cause)}. Finished blocks are kept: the same command goes on."
            ) from error
        self._report(Progress(total, total))
