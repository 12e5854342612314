"""Sharded networks (FSDP2): parameters, gradients, averages and optimizer state are split over ranks.

Parameters are DTensors, each split along its first dimension. States are saved as whole tensors, as those of a plain
network, so that training can resume on another number of ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from soflow_core.networks.base import NetworkModule

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

NetworkT = TypeVar("NetworkT", bound=NetworkModule)


def shard(network: NetworkT, mesh: DeviceMesh | None = None) -> NetworkT:
    """Splits the trained parameters over the ranks of the mesh, in place, and returns the network.

    All ranks must pass the same weights. `mesh` is by default all ranks, on the network's device; a mesh of
    (replicas, shards) splits over the second dimension. A network on the CPU moves to a mesh of GPUs block by block,
    so that no GPU needs room for all of it. Each block, and the rest as one, is gathered when it runs and freed
    afterwards, also after passes without gradient: the next pass would otherwise use weights from before an update.
    Raises ValueError where no process group is initialized.
    """
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise ValueError("sharding needs several processes: call torch.distributed.init_process_group first")
    if mesh is None:
        mesh = init_device_mesh(next(network.parameters()).device.type, (dist.get_world_size(),))
    frozen = {p for p in network.parameters() if not p.requires_grad}
    for p in frozen:
        p.data = p.data.to(mesh.device_type)
    parts: list[nn.Module] = [*network.repeated_blocks, network]
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
        if mesh.device_type != "cuda":
            # In torch 2.8 gloo sums where a mean is requested; a sum, divided afterwards, is right on every version.
            cast("FSDPModule", part).set_force_sum_reduction_for_comms(True)
    return network


def sharding_mesh(module: nn.Module) -> DeviceMesh | None:
    """Mesh of ranks that a module is split over; None for a module that is not sharded."""
    return next((p.device_mesh for p in module.parameters() if is_sharded(p)), None)


def compile_blocks(module: nn.Module) -> None:
    """Compiles a network with repeated blocks block by block, so that one trace serves them all; any other as a whole.

    The collectives between the blocks of a sharded network cannot be compiled.
    """
    blocks = module.repeated_blocks if isinstance(module, NetworkModule) else ()
    for part in blocks or [module]:
        part.compile(dynamic=False)


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is split over ranks.

    The module of such tensors takes half a second to import: where nothing has imported it, there are none.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its memory, without gradient; a plain tensor is returned as it is."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of all shards, on every rank; a collective. A plain tensor is returned as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shards a full tensor, equal on all ranks, like `like`."""
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor.to(like.device, like.dtype), like.device_mesh, like.placements, src_data_rank=None
    )


def split_slots(
    slots: Mapping[int, Mapping[str, Any]], parameters: Sequence[nn.Parameter]
) -> dict[int, dict[str, Any]]:
    """An optimizer's state, by the number of its parameter, with moments sharded like the parameters; it shares no memory with `slots`.

    What is behind the last parameter is left out.
    """

    def split(value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (split_like(value, parameter) if value.shape == parameter.shape else value).clone()

    return {
        index: {key: split(value, parameters[index]) for key, value in values.items()}
        for index, values in slots.items()
        if index < len(parameters)
    }


def on_every_rank(flags: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """(N,) bool -> (N,) bool: logical AND over the ranks of the mesh; a collective."""
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
    """Context in which parameters hold `values`; only passes without gradient may run in it."""
    shares = [local(p) for p in parameters]
    originals = [share.clone() for share in shares]
    torch._foreach_copy_(shares, [local(value) for value in values])
    try:
        yield
    finally:
        torch._foreach_copy_(shares, originals)
