"""Collective operations on Python objects and numbers over torch.distributed, for the ranks that train one network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from soflow_platform.errors import JobError

T = TypeVar("T")


def rows_of(rank: int, world: int, batch: int) -> int:
    """Number of rows of a global batch that a rank has: rank r of `world` has rows r, r + world, ..."""
    return len(range(rank, batch, world))


def all_gather_list(items: list[Any]) -> list[Any]:
    """Every rank's items, in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast_object(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank0(action: Callable[[], T], rank: int, world: int) -> T:
    """Run `action` on rank 0 and broadcast its result, or the JobError that it raised, to all ranks."""
    answer: Any = None
    if rank == 0:
        try:
            answer = action()
        except JobError as error:
            answer = error
    if world > 1:
        answer = broadcast_object(answer)
    if isinstance(answer, JobError):
        raise answer
    return cast(T, answer)


class PendingMaximum:
    """The largest of the ranks' numbers, on its way to each rank's host; made on every rank, in the same order.

    The host does not wait for it before `value`.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self._number = torch.full((), number, device=device)
        self._copied: torch.cuda.Event | None = None
        dist.all_reduce(self._number, dist.ReduceOp.MAX)
        if device.type == "cuda":
            reduced = self._number
            self._number = torch.empty((), dtype=reduced.dtype, pin_memory=True)
            self._number.copy_(reduced, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def value(self) -> int:
        """The maximum, once all that the device had to do before it is done."""
        if self._copied is not None:
            self._copied.synchronize()
        return int(self._number)


def mean_over_ranks(values: Mapping[str, float], rows: int) -> dict[str, float]:
    """Mean of each value over the ranks that report it, weighted by their numbers of rows.

    The mean of the loss is the loss of the global batch. A term that is computed on one kind of rows is missing on a rank without
    such rows; its mean is that of the global batch where ranks have equally many rows of that kind.
    """
    reports = all_gather_list([(rows, dict(values))])
    names = sorted({name for _, each in reports for name in each})
    means = {}
    for name in names:
        parts = [(each[name], count) for count, each in reports if name in each]
        means[name] = math.fsum(value * count for value, count in parts) / sum(count for _, count in parts)
    return means
