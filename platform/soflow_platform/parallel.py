"""Several ranks that train one network: how it is wrapped, and what the ranks tell each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
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
    experiment: Experiment, config: DiTConfig, device: torch.device, world: int
) -> TrainStep:
    """Network with weights drawn from the seed, optimizer and EMAs; wrapped for several ranks."""
    torch.manual_seed(experiment.seed)
    plain = DiT(config).to(device)
    network: nn.Module = plain
    training = experiment.training
    reduces = world > 1 and experiment.objective.uses_jvp and training.parallel == "ddp"
    if training.parallel == "fsdp" and world > 1:
        from soflow_core.sharding import shard

        network = shard(plain)
    elif world > 1 and not reduces:
        network = DistributedDataParallel(plain, device_ids=[device] if device.type == "cuda" else None)
    return TrainStep(
        network,
        experiment.objective,
        experiment.optimizer,
        total_steps=training.steps,
        ema_decays=training.ema,
        precision=training.precision,
        clip_norm=training.clip_norm,
        compile=training.compile,
        reduce_gradients=average_gradients if reduces else None,
        gather=every_ranks if world > 1 and training.parallel == "ddp" else None,
        deterministic=training.deterministic,
        accumulate=training.accumulate,
    )


def average_gradients(gradients: list[torch.Tensor]) -> None:
    """Mean over ranks, in place, in one message."""
    flat = torch._utils._flatten_dense_tensors(gradients)
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


def mean_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's mean over the ranks that hold it: one without rows of a kind has no term of it."""
    told = gather([dict(values)])
    names = sorted({name for each in told for name in each})
    return {name: statistics.fmean(each[name] for each in told if name in each) for name in names}


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
        """(rank, how many times the median) of the slowest rank where it stays slow. All ranks take part."""
        seconds = gather([self.seconds])
        self.seconds = 0.0
        median = statistics.median_low(seconds)
        ratio = max(seconds) / median if median else 1.0
        rank = seconds.index(max(seconds))
        self._slow = [*self._slow, rank][-SLOW_IN_ROW:] if ratio > SLOW else []
        return (rank, ratio) if self._slow == [rank] * SLOW_IN_ROW else None
