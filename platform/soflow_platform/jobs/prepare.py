"""`soflowctl data prepare`: builds a shard set, in this process where that is soon done, else on all machines of a Ray cluster.

On a cluster each shard is one task of a `BuilderActor`, which decodes on threads while it encodes. The shards of a lost actor are
built by another; the driver writes index, manifest and `dataset.json` at the end. What each shard holds and how progress is
recorded is in `soflow_pipelines.preparation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from soflow_pipelines.images.autoencoder import load_autoencoder
from soflow_pipelines.preparation.build import DamagedImages, ShardBuilder
from soflow_pipelines.preparation.shard_plan import PrepareSettings, ShardPlan
from soflow_pipelines.preparation.state import begin, exclusive, finish
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import SourceOptions, open_source
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.cluster.actor_pool import ActorPool, Progress, Report, deterministic_torch, no_report
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.errors import JobError
from soflow_platform.jobs.prepare_here import build_here

NAMED_DAMAGES = 20
"""Damaged images that an error lists by name."""


@dataclass(frozen=True)
class PrepareRequest:
    """Source, target and settings of a preparation."""

    source: str
    out: str
    """Folder or URI of the shard set."""
    resolution: int | None = None
    """None for the source's own, or 256."""
    autoencoder: str | None = None
    """A hub id or folder; None to store pixels."""
    flips: bool = False
    dtype: Literal["float16", "float32"] = "float16"
    """Floating-point type in which latents are stored."""
    seed: int = 0
    shard_megabytes: int = 256
    batch: int = 32
    skip_damaged: bool = False
    options: SourceOptions = field(default_factory=SourceOptions)
    """What is taken of the source."""


@dataclass(frozen=True)
class Prepared:
    """The finished set."""

    info: DatasetInfo
    built: int
    """Shards built by this run; 0 where the set was complete already."""
    label_origin: str | None = None
    """Where the labels are from; None where the images have none."""
    passed_over: int = 0
    """Files of the source that are no images, hidden, or leftovers of another system."""


def prepare(request: PrepareRequest, address: str | None = None, report: Report = no_report) -> Prepared:
    """Prepares a shard set, or what is missing of it, on the Ray cluster at `address`.

    Without an address this process builds it, and leaves to a local Ray what would take long.

    Raises InputError for a request that cannot be carried out, JobError where a shard fails.
    """
    plan = make_plan(request)
    store = open_storage(request.out)
    with exclusive(store):
        pending = begin(plan, store)
        if pending is None:
            return Prepared(read_info(request.out), 0, plan.source.label_origin, plan.source.ignored)
        if pending:
            _build(plan, request, pending, address, _never_less(report))
        return Prepared(finish(plan, store), len(pending), plan.source.label_origin, plan.source.ignored)


def make_plan(request: PrepareRequest) -> ShardPlan:
    """Lists the source and decides which image goes into which shard; nothing is written. Raises InputError."""
    source = open_source(request.source, request.options)
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

    def __init__(
        self, plan: ShardPlan, request: PrepareRequest, threads: int, count: Callable[[int], None]
    ) -> None:
        # One thread for torch also where several decode: a shard that is built again has the same bytes.
        device = deterministic_torch(1)
        encoder = load_autoencoder(str(request.autoencoder), device) if _encodes(plan) else None
        self._builder = ShardBuilder(plan, open_storage(request.out), encoder, threads, count)

    def run(self, shard: int) -> list[str]:
        """Builds a shard; returns the damaged images that prevent it, each with what is wrong, or none."""
        try:
            self._builder.build(shard)
        except DamagedImages as error:
            return error.errors
        return []


def _build(
    plan: ShardPlan, request: PrepareRequest, pending: list[int], address: str | None, report: Report
) -> None:
    """Builds the pending shards. Raises InputError, JobError."""
    left, damaged = pending, []
    if address is None and not (_encodes(plan) and torch.cuda.is_available()):
        encoder = load_autoencoder(str(request.autoencoder)) if _encodes(plan) else None
        here = build_here(plan, open_storage(request.out), encoder, pending, report)
        left, damaged = here.left, here.damaged
    if left:
        with connected(address) as cluster:
            damaged += build_on(cluster, plan, request, left, report)
    if damaged:
        raise JobError(_list_damaged(damaged))
    report(Progress(plan.samples, plan.samples))


def _never_less(report: Report) -> Report:
    """A report whose number of images does not fall where a shard that was begun here is built anew by Ray."""
    most = 0

    def reported(progress: Progress) -> None:
        nonlocal most
        most = max(most, progress.done)
        report(Progress(most, progress.total))

    return reported


def _encodes(plan: ShardPlan) -> bool:
    """Whether images go through an autoencoder."""
    return plan.autoencoder is not None and plan.encoded is None


def build_on(
    cluster: Cluster, plan: ShardPlan, request: PrepareRequest, pending: list[int], report: Report
) -> list[str]:
    """Builds the pending shards on a cluster; returns the damaged images that prevent some. Raises InputError, JobError."""
    pool: ActorPool[int] = ActorPool(
        cluster,
        BuilderActor,
        (plan, request),
        describe=lambda shard: f"shard {shard}",
        resume_hint="Finished shards are kept",
        uses_gpu=_encodes(plan),
    )
    start = Progress(plan.samples - sum(len(plan.shard_samples(shard)) for shard in pending), plan.samples)
    return [image for _, images in pool.imap_unordered(pending, start, report) for image in images]


def _list_damaged(images: list[str]) -> str:
    named = "\n  ".join(sorted(images)[:NAMED_DAMAGES])
    more = f"\n  and {len(images) - NAMED_DAMAGES} more" if len(images) > NAMED_DAMAGES else ""
    return (
        f"{len(images)} images cannot be used; mend or remove them, or pass --skip-damaged to leave them out:\n"
        f"  {named}{more}"
    )
