"""`soflowctl data prepare`: builds a shard set on all machines of a Ray cluster.

Each shard is one task of a `BuilderActor`, which decodes on threads while it encodes. The shards of a lost actor are built by
another; the driver writes index, manifest and `dataset.json` at the end. What each shard holds and how progress is recorded is in
`soflow_pipelines.preparation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from soflow_core.failures import summarize
from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.preparation.build import DamagedImages, ShardBuilder
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.preparation.state import begin, exclusive, finish
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import open_source
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.cluster.actor_pool import CallbackActorPool as ActorPool
from soflow_platform.cluster.actor_pool import TaskError, new_counter, read_counter, share_cluster
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.errors import JobError

NAMED_DAMAGES = 20
"""Damaged images that an error lists by name."""


@dataclass(frozen=True)
class PrepareRequest:
    """Source, target and settings of a preparation."""

    source: str
    out: str
    """Folder or URI of the shard set."""
    split: str = "train"
    resolution: int | None = None
    """None for the source's own, or 256."""
    autoencoder: str | None = None
    """A hub id or folder; None to store pixels."""
    flips: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    """Of latents."""
    seed: int = 0
    shard_megabytes: int = 256
    batch: int = 32
    skip_damaged: bool = False
    image_column: str | None = None
    label_column: str | None = None


@dataclass(frozen=True)
class Progress:
    """Images that are done, of all."""

    images: int
    total: int


@dataclass(frozen=True)
class Prepared:
    """The finished set."""

    info: DatasetInfo
    built: int
    """Shards built by this run; 0 where the set was complete already."""


Report = Callable[[Progress], None]


def prepare(request: PrepareRequest, address: str | None = None, report: Report = lambda _: None) -> Prepared:
    """Prepares a shard set, or what is missing of it, on the Ray cluster at `address` or on a local one.

    Raises InputError for a request that cannot be carried out, JobError where a shard fails.
    """
    plan = make_plan(request)
    store = open_storage(request.out)
    with exclusive(store):
        pending = begin(plan, store)
        if pending is None:
            return Prepared(read_info(request.out), 0)
        if pending:
            with connected(address) as cluster:
                _build(plan, request, pending, cluster, report)
        return Prepared(finish(plan, store), len(pending))


def make_plan(request: PrepareRequest) -> ShardPlan:
    """Lists the source and decides which image goes into which shard; nothing is written. Raises InputError."""
    source = open_source(request.source, request.split, request.image_column, request.label_column)
    facts = load_autoencoder(request.autoencoder).facts if request.autoencoder else None
    settings = PrepareSettings(
        resolution=request.resolution or source.resolution or 256,
        flips=request.flips,
        dtype=request.dtype,
        seed=request.seed,
        shard_bytes=request.shard_megabytes * 2**20,
        batch=request.batch,
        skip_damaged=request.skip_damaged,
    )
    return ShardPlan(source, settings, facts)


class BuilderActor:
    """Ray actor that builds shards, one after the other."""

    def __init__(self, plan: ShardPlan, request: PrepareRequest, threads: int, counter: Any) -> None:
        import torch

        # One thread and deterministic kernels: latents are the same to the last bit on every machine with the
        # same kind of device, so that a shard that is built again has the same bytes.
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = False
        device = "cuda" if torch.cuda.is_available() else "cpu"
        encoder = load_autoencoder(request.autoencoder, device) if request.autoencoder else None
        self._builder = ShardBuilder(
            plan,
            open_storage(request.out),
            encoder,
            threads,
            on_images=lambda images: counter.add.remote(images),
        )

    def build(self, shard: int) -> list[str]:
        """Builds a shard; returns the damaged images that prevent it, each with what is wrong, or none."""
        try:
            self._builder.build(shard)
        except DamagedImages as error:
            return error.errors
        return []


def _build(
    plan: ShardPlan, request: PrepareRequest, pending: list[int], cluster: Cluster, report: Report
) -> None:
    """Builds the pending shards on the cluster. Raises JobError."""
    import ray

    share = share_cluster(cluster, len(pending), plan.autoencoder is not None)
    counter, made = new_counter(), 0
    shared_plan = ray.put(plan)

    def new_builder() -> Any:
        actor = ray.remote(BuilderActor).options(num_cpus=share.cpus, num_gpus=share.gpus)
        return actor.remote(shared_plan, request, share.threads, counter)

    done = plan.samples - sum(len(plan.shard_samples(shard)) for shard in pending)
    damaged: list[str] = []
    pool: ActorPool[int] = ActorPool(
        new_builder,
        start=lambda builder, shard: builder.build.remote(shard),
        named=lambda shard: f"shard {shard}",
        kept="Finished shards are kept",
        cluster=cluster,
    )
    try:
        for finished in pool.run(pending, share.actors):
            if finished is not None:
                damaged += finished[1]
            made = read_counter(counter, made)
            report(Progress(done + made, plan.samples))
    except TaskError as error:
        raise JobError(
            f"shard {error.task} failed: {summarize(error.cause)}. Finished shards are kept: the same command goes on."
        ) from error
    if damaged:
        raise JobError(_list_damaged(damaged))
    report(Progress(plan.samples, plan.samples))


def _list_damaged(images: list[str]) -> str:
    named = "\n  ".join(sorted(images)[:NAMED_DAMAGES])
    more = f"\n  and {len(images) - NAMED_DAMAGES} more" if len(images) > NAMED_DAMAGES else ""
    return (
        f"{len(images)} images cannot be used; mend or remove them, or pass --skip-damaged to leave them out:\n"
        f"  {named}{more}"
    )
