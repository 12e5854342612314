"""Several ranks that train one network: how it is wrapped, and what the ranks tell each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from soflow_platform.errors import JobError

T = TypeVar("T")


def rows_of(rank: int, world: int, batch: int) -> int:
    """Rows of a global batch that a rank has: every world-th."""
    return len(range(rank, batch, world))


def all_gather_list(items: list[Any]) -> list[Any]:
    """Every rank's items, in rank order, on every rank."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast_object(value: Any) -> Any:
    """What rank 0 holds, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def run_on_rank0(action: Callable[[], T], rank: int, world: int) -> T:
    """What `action` gives on rank 0, on every rank; where it raises JobError there, every rank does."""
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


def all_reduce_max(number: int, device: torch.device) -> int:
    """The highest of the ranks' numbers, on every rank."""
    told = torch.tensor(number, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return int(told)


def mean_over_ranks(values: Mapping[str, float], rows: int) -> dict[str, float]:
    """Each value's mean over the ranks that hold it, counting by their rows: one without rows of a kind has no term of it.

    The loss is that of the global batch. A term of one kind of rows is so where ranks hold equally many of that kind.
    """
    told = all_gather_list([(rows, dict(values))])
    names = sorted({name for _, each in told for name in each})
    means = {}
    for name in names:
        parts = [(each[name], count) for count, each in told if name in each]
        means[name] = math.fsum(value * count for value, count in parts) / sum(count for _, count in parts)
    return means
