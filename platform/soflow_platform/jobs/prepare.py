"""Making a shard set on all machines of a Ray cluster.

Each shard is one task of a builder actor, which decodes on threads while it encodes. The driver keeps every
builder busy, gives the shards of a lost one to another, and writes the manifest at the end. Everything
that makes a run exact (what each shard holds, complete-or-absent files, notes) is in
`soflow_pipelines.preparation.shard_plan`; this spreads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soflow_core.failures import summarize
from soflow_pipelines.images.autoencoder import AutoencoderError, load_autoencoder
from soflow_pipelines.preparation.build import build_shard
from soflow_pipelines.preparation.shard_plan import DamagedImages, Preparation, PrepareSettings
from soflow_pipelines.preparation.state import finish, only_one, start
from soflow_pipelines.shards.info import DatasetInfo, ShardError
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.sources.source import SourceError
from soflow_pipelines.storage.object_store import ObjectStore, StorageError
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.cluster.actor_pool import CallbackActorPool as ActorPool
from soflow_platform.cluster.actor_pool import TaskError, new_counter, read_counter, share_cluster
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.errors import JobError, UserError

NAMED_DAMAGES = 20


@dataclass(frozen=True)
class PrepareRequest:
    """What `soflowctl data prepare` was asked for."""

    source: str
    out: str
    split: str = "train"
    resolution: int | None = None  # None: the source's own, or 256
    autoencoder: str | None = None  # None: pixels
    flips: bool = False
    dtype: str = "float16"
    seed: int = 0
    shard_megabytes: int = 256
    batch: int = 32
    skip_damaged: bool = False
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Progress:
    """How far a preparation is."""

    images: int
    total: int


@dataclass(frozen=True)
class Prepared:
    """The set, and whether this run had anything to do."""

    info: DatasetInfo
    built: int  # shards


Report = Callable[[Progress], None]


def prepare(request: PrepareRequest, address: str | None = None, report: Report | None = None) -> Prepared:
    """Makes the set, or what is missing of it. UserError for what cannot be made, JobError for what failed."""
    try:
        plan = make_plan(request)
    except (SourceError, AutoencoderError, ValueError) as error:
        raise UserError(str(error)) from error
    try:
        storage = open_storage(request.out)
        with only_one(storage):
            todo = start(plan, storage)
            if todo is None:
                return Prepared(read_info(request.out), 0)
            if todo:
                with connected(address) as cluster:
                    _build(plan, request, todo, cluster, report or _silent)
            return Prepared(finish(plan, storage), len(todo))
    except (ShardError, StorageError) as error:
        raise UserError(str(error)) from error


def _silent(progress: Progress) -> None:
    """For a caller that shows no progress."""
    del progress


def make_plan(request: PrepareRequest) -> Preparation:
    """Lists the source and decides which image goes into which shard; nothing is written."""
    source = open_source(request.source, request.split, request.image_column, request.label_column)
    facts = load_autoencoder(request.autoencoder).facts if request.autoencoder else None
    settings = PrepareSettings(
        resolution=request.resolution or source.resolution or 256,
        flips=request.flips,
        dtype="float32" if request.dtype == "float32" else "float16",
        seed=request.seed,
        shard_bytes=request.shard_megabytes * 2**20,
        batch=request.batch,
        skip_damaged=request.skip_damaged,
    )
    return Preparation(source, settings, facts)


class Builder:
    """An actor that builds shards, one after the other."""

    def __init__(self, plan: Preparation, request: PrepareRequest, threads: int, counter: Any) -> None:
        import torch

        # One thread and deterministic kernels: the last bits of a latent are the same on every machine
        # of a kind, so that a shard built again has the same bytes.
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._encoder = load_autoencoder(request.autoencoder, device) if request.autoencoder else None
        self._plan = plan
        self._storage: ObjectStore = open_storage(request.out)
        self._threads = threads
        self._counter = counter

    def build(self, shard: int) -> list[str]:
        """Builds a shard; the damaged images that prevent it, or none."""
        try:
            build_shard(self._plan, shard, self._storage, self._encoder, self._threads, self._count)
        except DamagedImages as error:
            return error.errors
        return []

    def _count(self, images: int) -> None:
        self._counter.add.remote(images)


def _build(
    plan: Preparation, request: PrepareRequest, todo: list[int], cluster: Cluster, report: Report
) -> None:
    import ray

    share = share_cluster(cluster, len(todo), plan.autoencoder is not None)
    counter, made = new_counter(), 0
    shared_plan = ray.put(plan)

    def new_builder() -> Any:
        actor = ray.remote(Builder).options(num_cpus=share.cpus, num_gpus=share.gpus)
        return actor.remote(shared_plan, request, share.threads, counter)

    done = plan.samples - sum(len(plan.shard_samples(shard)) for shard in todo)
    damages: list[str] = []
    spread: ActorPool[int] = ActorPool(
        new_builder,
        start=lambda builder, shard: builder.build.remote(shard),
        named=lambda shard: f"shard {shard}",
        kept="Finished shards are kept",
        cluster=cluster,
    )
    try:
        for finished in spread.run(todo, share.actors):
            if finished is not None:
                damages += finished[1]
            made = read_counter(counter, made)
            report(Progress(done + made, plan.samples))
    except TaskError as error:
        raise JobError(
            f"shard {error.task} failed: {summarize(error.cause)}. Finished shards are kept: the same command goes on."
        ) from error
    if damages:
        raise JobError(_damage_sentence(damages))
    report(Progress(plan.samples, plan.samples))


def _damage_sentence(damages: list[str]) -> str:
    named = "\n  ".join(sorted(damages)[:NAMED_DAMAGES])
    more = f"\n  and {len(damages) - NAMED_DAMAGES} more" if len(damages) > NAMED_DAMAGES else ""
    return (
        f"{len(damages)} images cannot be used; mend or remove them, or pass --skip-damaged to leave them out:\n"
        f"  {named}{more}"
    )
