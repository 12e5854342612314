"""Gradient synchronization between the ranks of one training: none, DDP, a single all-reduce, or FSDP."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from soflow_core.networks.base import NetworkModule
from soflow_core.objectives.base import Batch
from soflow_core.sharding import shard


class GradientSync(Protocol):
    """How the ranks of a training come to the same mean gradient; the methods below do for one process."""

    carries_jvp: ClassVar[bool] = True
    """Whether the wrapped network has a forward-mode derivative."""
    replicated: ClassVar[bool] = False
    """Whether every rank holds all parameters and gradients, which must then be equal on all of them."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network whose forward and backward passes a step runs."""
        return network

    def accumulation(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Context for one of the backward passes of a step; `network` is the wrapped one."""
        del network, last
        return nullcontext()

    def reduce(self, gradients: list[Tensor]) -> None:
        """Averages the gradients over the ranks, in place, after the last backward pass of a step."""
        del gradients


class Local(GradientSync):
    """A training of one process: nothing is exchanged."""


@dataclass(frozen=True)
class DDP(GradientSync):
    """DistributedDataParallel, which exchanges gradients in buckets during the last backward pass of a step."""

    weight: float = 1.0
    """Factor of this rank's gradients in the mean: world x rows of this rank / rows of all."""

    carries_jvp: ClassVar[bool] = False
    replicated: ClassVar[bool] = True

    def wrap(self, network: nn.Module) -> nn.Module:
        device = next(network.parameters()).device
        wrapped = DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
        if self.weight != 1:
            # torch refuses a hook whose annotations are strings, as in this file; a lambda has none.
            wrapped.register_comm_hook(self.weight, lambda weight, bucket: _weighted_mean(weight, bucket))
        return wrapped

    def accumulation(self, network: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(DistributedDataParallel, network).no_sync()


@dataclass(frozen=True)
class FlatAllReduce(GradientSync):
    """One all-reduce of all gradients, in a fixed order, after the last backward pass of a step.

    Slower than DDP, whose buckets travel during the backward pass. It is needed where the objective takes a
    Jacobian-vector product, and where the order of a sum over more than two ranks must not change.
    """

    weight: float = 1.0
    """Factor of this rank's gradients in the mean: world x rows of this rank / rows of all."""

    replicated: ClassVar[bool] = True

    def reduce(self, gradients: list[Tensor]) -> None:
        flat = torch._utils._flatten_dense_tensors(gradients)
        flat *= self.weight
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        means = torch._utils._unflatten_dense_tensors(flat, gradients)
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean)


@dataclass(frozen=True)
class FSDP(GradientSync):
    """Fully sharded: each rank holds a share of the parameters, gradients, averages and optimizer state.

    Gradients are exchanged in every backward pass, because a rank has no room for whole ones between them.
    """

    mesh: DeviceMesh | None = None
    """Ranks and device to shard over; None is all ranks, on the network's device. A network may be on the CPU."""

    def wrap(self, network: nn.Module) -> nn.Module:
        if not isinstance(network, NetworkModule):
            raise ValueError(f"FSDP shards a NetworkModule; the network is a {type(network).__name__}")
        return shard(network, self.mesh)


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Every rank's version of a tensor of one shape, in rank order, on every rank."""
    versions = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(versions, tensor.contiguous())
    return versions


def with_whole(batch: Batch) -> Batch:
    """This rank's rows, with those of all ranks as their whole batch: rank r of n has r, r + n, ... of it, as many as the others."""
    labels = None if batch.labels is None else _all_rows(batch.labels)
    return replace(batch, whole=Batch(_all_rows(batch.x0), labels))


def _all_rows(tensor: Tensor) -> Tensor:
    """(B, ...) of each of n ranks -> (n B, ...), in the order of the whole batch."""
    return torch.stack(all_gather(tensor), dim=1).flatten(0, 1)


def _weighted_mean(weight: float, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook of DDP: the mean over the ranks, each counted with its weight."""
    bucket.buffer().mul_(weight)
    return allreduce_hook(cast(Any, None), bucket)
