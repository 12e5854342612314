"""Several ranks that train one network: how it is wrapped, and what the ranks tell each other."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from soflow_core.networks import DiT, DiTConfig
from soflow_core.training import TrainStep
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError

T = TypeVar("T")

SLOW = 1.5
"""A rank whose forward passes take this many times the median is called slow..."""
SLOW_IN_ROW = 3
"""...where they did so this many times, one after the other."""


def build_train_step(
    experiment: Experiment, config: DiTConfig, device: torch.device, world: int, rank: int = 0
) -> TrainStep:
    """Network with weights drawn from the seed, optimizer and EMAs; wrapped for several ranks.

    Where the batch does not divide, a rank's gradients count as many times as it has rows.
    """
    torch.manual_seed(experiment.seed)
    plain = DiT(config)
    network: nn.Module = plain
    training = experiment.training
    weight = rows_of(rank, world, training.batch) * world / training.batch
    # DistributedDataParallel lays its messages out anew after the first step, and a sum over 3 ranks or more depends on where in
    # a message a number lies: only one message of always the same order gives a resumed run the same bits.
    ordered = experiment.objective.uses_jvp or (training.deterministic and world > 2)
    reduces = world > 1 and ordered and training.parallel == "ddp"
    if training.parallel == "fsdp" and world > 1:
        from soflow_core.sharding import shard

        # Block by block from the CPU: no device need hold it whole.
        network = shard(plain, init_device_mesh(device.type, (world,)))
    else:
        plain.to(device)
    if world > 1 and not reduces and training.parallel == "ddp":
        network = DistributedDataParallel(plain, device_ids=[device] if device.type == "cuda" else None)
        if training.batch % world:
            # Annotations that are strings, as in this file, would be refused; a lambda has none.
            network.register_comm_hook(weight, lambda weight, bucket: _weighted_mean(weight, bucket))
    return TrainStep(
        network,
        experiment.objective,
        experiment.optimizer,
        total_steps=training.steps,
        ema_decays=training.ema,
        precision=training.precision,
        clip_norm=training.clip_norm,
        compile=training.compile,
        reduce_gradients=partial(average_gradients, weight=weight) if reduces else None,
        gather=every_ranks if world > 1 and training.parallel == "ddp" else None,
        deterministic=training.deterministic,
        accumulate=training.accumulate,
    )


def rows_of(rank: int, world: int, batch: int) -> int:
    """Rows of a global batch that a rank has: every world-th."""
    return len(range(rank, batch, world))


def _weighted_mean(weight: float, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DistributedDataParallel does with a bucket of gradients, of ranks that count by their rows."""
    bucket.buffer().mul_(weight)
    return allreduce_hook(None, bucket)  # type: ignore[arg-type]


def average_gradients(gradients: list[torch.Tensor], weight: float = 1.0) -> None:
    """Mean over ranks, each counting by its weight, in place, in one message."""
    flat = torch._utils._flatten_dense_tensors(gradients)
    flat *= weight
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
        gradient.copy_(mean)


def every_ranks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's version of a tensor, in rank order."""
    versions = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(versions, tensor.contiguous())
    return versions


def gather(items: list[Any]) -> list[Any]:
    """Every rank's items, in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def from_first(value: Any) -> Any:
    """What rank 0 holds, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def told_by_first(action: Callable[[], T], rank: int, world: int) -> T:
    """What `action` gives on rank 0, on every rank; where it raises JobError there, every rank does."""
    answer: Any = None
    if rank == 0:
        try:
            answer = action()
        except JobError as error:
            answer = error
    if world > 1:
        answer = from_first(answer)
    if isinstance(answer, JobError):
        raise answer
    return cast(T, answer)


def highest(number: int, device: torch.device) -> int:
    """The highest of the ranks' numbers, on every rank."""
    told = torch.tensor(number, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def mean_over_ranks(values: Mapping[str, float], rows: int) -> dict[str, float]:
    """Each value's mean over the ranks that hold it, counting by their rows: one without rows of a kind has no term of it.

    The loss is that of the global batch. A term of one kind of rows is so where ranks hold equally many of that kind.
    """
    told = gather([(rows, dict(values))])
    names = sorted({name for _, each in told for name in each})
    means = {}
    for name in names:
        parts = [(each[name], count) for count, each in told if name in each]
        means[name] = math.fsum(value * count for value, count in parts) / sum(count for _, count in parts)
    return means


class ForwardTimer:
    """Seconds that this rank's forward passes take.

    A step as a whole takes as long on every rank, for they wait for each other's gradients; a forward pass waits for nobody, so
    that a slow rank shows here.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.seconds = 0.0
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._started = 0.0
        self.measuring = False
        self._slow: list[int] = []
        self._named: int | None = None
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        if self.measuring:
            self._wait()
            self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        if self.measuring:
            self._wait()
            self.seconds += time.perf_counter() - self._started

    def slow_rank(self) -> tuple[int, float] | None:
        """(rank, how many times the median) of the slowest rank where it stays slow, once until that ends. All ranks take part."""
        seconds = gather([self.seconds])
        self.seconds = 0.0
        median = statistics.median_low(seconds)
        ratio = max(seconds) / median if median else 1.0
        rank = seconds.index(max(seconds))
        self._slow = [*self._slow, rank][-SLOW_IN_ROW:] if ratio > SLOW else []
        if not self._slow:
            self._named = None
        if self._slow != [rank] * SLOW_IN_ROW or self._named == rank:
            return None
        self._named = rank
        return rank, ratio
