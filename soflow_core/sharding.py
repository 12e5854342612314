"""A network whose parameters, gradients, averages and optimizer state are spread over ranks (FSDP2).

Its parameters are DTensors, each split along its first dimension. States that leave it are the plain
network's, of whole tensors, so that a training goes on with another number of ranks, or with one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from soflow_core.networks.dit import DiT


def shard(network: DiT, mesh: DeviceMesh | None = None) -> DiT:
    """Splits the trained parameters over the ranks of the mesh, in place, and returns the network.

    Every rank must give the same weights. `mesh` is by default all ranks, on the network's device; a mesh of
    (replicas, shards) splits over the second. A network built on the CPU goes to a mesh of GPUs block by
    block, so the whole need never fit there. Each block, and the rest as one, is gathered when it runs and
    let go afterwards, also after passes without gradient: otherwise the next pass would see weights from
    before an update.
    """
    if not dist.is_initialized():
        raise ValueError("sharding needs several processes: call torch.distributed.init_process_group first")
    if mesh is None:
        mesh = init_device_mesh(network.pos_embed.device.type, (dist.get_world_size(),))
    frozen = {p for p in network.parameters() if not p.requires_grad}
    for p in frozen:
        p.data = p.data.to(mesh.device_type)
    for part in (*network.blocks, network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
        if mesh.device_type != "cuda":
            # gloo takes a mean for a sum in torch 2.8; a sum, divided afterwards, is the same everywhere.
            cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)
    return network


def sharding_mesh(module: nn.Module) -> DeviceMesh | None:
    """The ranks that a module is split over; None for a plain one."""
    if not isinstance(module, FSDPModule):
        return None
    return next(p.device_mesh for p in module.parameters() if isinstance(p, DTensor))


def compile_blocks(module: nn.Module) -> None:
    """Compiles a DiT block by block, which is traced once for all of them; another network as a whole.

    What ranks exchange between the blocks of a sharded network cannot be compiled.
    """
    for part in module.blocks if isinstance(module, DiT) else [module]:
        part.compile(dynamic=False)


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor, of the same memory, without gradient; a plain tensor is its own share."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All shares of a tensor together, on every rank; all ranks must call it. A plain tensor is whole."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, of which every rank has the same, split as `like` is."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None
    )


def on_every_rank(flags: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """(N,) bool -> (N,) bool: true where every rank of the mesh says so; all ranks must call it."""
    if mesh is None:
        return flags
    votes = flags.int()
    for dimension in range(mesh.ndim):
        dist.all_reduce(votes, dist.ReduceOp.MIN, group=mesh.get_group(dimension))
    return votes.bool()


def is_first(mesh: DeviceMesh) -> bool:
    """Whether this is the first rank of a mesh."""
    coordinate = mesh.get_coordinate()
    return coordinate is not None and not any(coordinate)


@contextmanager
def substituted(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the shares of the parameters hold those of `values`; only passes without gradient may run."""
    shares = [local(p) for p in parameters]
    kept = [share.clone() for share in shares]
    torch._foreach_copy_(shares, [local(value) for value in values])
    try:
        yield
    finally:
        torch._foreach_copy_(shares, kept)
