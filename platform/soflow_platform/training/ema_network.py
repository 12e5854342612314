"""The network with averaged (EMA) weights, for evaluations during training: a copy on each rank, or sharded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from soflow_core.networks import Architecture, NetworkModule
from soflow_core.sampling_networks import SamplingNetwork
from soflow_core.train_step import TrainStep
from soflow_platform.evaluation.ranks import Ranks
from soflow_platform.training import distributed


@contextlib.contextmanager
def ema_network(
    train_step: TrainStep,
    config: Architecture,
    device: torch.device,
    rank: int,
    world: int,
    should_stop: Callable[[], bool],
) -> Iterator[tuple[SamplingNetwork, Ranks]]:
    """The network with the first EMA's weights for the length of a block, and the ranks that evaluate it together.

    All ranks must enter the block. The number of forward passes may differ between ranks, before and after each `gather`.
    `should_stop` is a collective call. The evaluation of a sharded network is not interrupted: its ranks need not be at the same
    batch, so that they cannot make that call together.
    """
    if train_step.mesh is None:
        # The initial weights of the new network are overwritten; drawing them must not advance the training's random generator.
        with torch.random.fork_rng(devices=[]):
            network = config.build().to(device).eval()
        network.load_state_dict(train_step.ema_state())
        yield network, DataParallel(rank, world, should_stop)
        return
    with train_step.averaged() as shares:
        lockstep = LockstepNetwork(cast(NetworkModule, shares), device)
        yield lockstep, Lockstep(rank, world, lockstep)
        lockstep.drain()


@dataclass(frozen=True)
class DataParallel:
    """Ranks that each hold a copy of the network."""

    rank: int
    world: int
    should_stop: Callable[[], bool]

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in rank order, on every rank."""
        return distributed.all_gather_list(items) if self.world > 1 else items


@dataclass(frozen=True)
class Lockstep:
    """Ranks that each hold a shard of the network, so that every forward pass is a collective operation."""

    rank: int
    world: int
    network: LockstepNetwork

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in rank order, on every rank, once all have run their forward passes."""
        self.network.drain()
        return distributed.all_gather_list(items)

    def should_stop(self) -> bool:
        """Always False: ranks need not be at the same batch and cannot agree between batches."""
        return False


class LockstepNetwork:
    """A sharded network of which each rank may run a different number of forward passes.

    Each forward pass of a sharded network is a collective operation. A rank that has finished runs dummy passes until all have.
    """

    def __init__(self, network: NetworkModule, device: torch.device) -> None:
        self.network, self.device = network, device
        self.config = network.config

    def __call__(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        distributed.PendingMaximum(1, self.device).value()
        return self._pass(x, t, s, labels, scale)

    def drain(self) -> None:
        """Run dummy passes until all ranks have run theirs."""
        config = self.config
        x = torch.zeros(1, *config.sample_shape, device=self.device)
        t = torch.zeros(1, device=self.device)
        labels = None if config.classes is None else torch.zeros(1, dtype=torch.long, device=self.device)
        while distributed.PendingMaximum(0, self.device).value():
            self._pass(x, t, t, labels)

    def _pass(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        # FSDP keeps the buffers that it gathers parameters into; made in inference mode they could not be trained with afterwards.
        with torch.inference_mode(False), torch.no_grad():
            return cast(Tensor, self.network(x, t, s, labels, scale))
