"""The network with averaged weights, as it is sampled from during training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from soflow_core.networks import DiT, DiTConfig
from soflow_core.train_step import TrainStep
from soflow_platform.training import distributed

Merge = Callable[[list[Any]], list[Any]]


@contextlib.contextmanager
def ema_network(
    train_step: TrainStep, config: DiTConfig, device: torch.device, world: int
) -> Iterator[tuple[DiT, Merge]]:
    """The network with the first EMA's weights for the length of a block, and what brings the ranks' parts of a score together.

    All ranks must enter the block. Each may make passes of its own number there, before every merge and after.
    """
    if train_step.mesh is None:
        # A new network draws weights that are written over: those draws are not the training's.
        with torch.random.fork_rng(devices=[]):
            network = DiT(config).to(device).eval()
        network.load_state_dict(train_step.ema_state())
        yield network, distributed.all_gather_list if world > 1 else list
        return
    with train_step.averaged() as shares:
        joint = LockstepNetwork(cast(DiT, shares), device)
        # A sampler calls its network and reads its config, no more.
        yield cast(DiT, joint), joint.gather
        joint.attend()


class LockstepNetwork:
    """A sharded network that each rank samples from at its own pace.

    A pass of a sharded network is an exchange of all ranks: a rank that is done makes passes of nothing for the others.
    """

    def __init__(self, network: DiT, device: torch.device) -> None:
        self.network, self.device = network, device
        self.config = network.config

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        distributed.all_reduce_max(1, self.device)
        return self._pass(x, t, s, labels)

    def attend(self) -> None:
        """Take part in the others' passes until no rank makes any more."""
        config = self.config
        x = torch.zeros(1, config.channels, config.height, config.width, device=self.device)
        t = torch.zeros(1, device=self.device)
        labels = None if config.classes is None else torch.zeros(1, dtype=torch.long, device=self.device)
        while distributed.all_reduce_max(0, self.device):
            self._pass(x, t, t, labels)

    def gather(self, items: list[Any]) -> list[Any]:
        """Every rank's items, in rank order, on every rank, once all have made their passes."""
        self.attend()
        return distributed.all_gather_list(items)

    def _pass(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        # What is gathered in inference mode cannot be trained with afterwards, and the memory for it is kept.
        with torch.inference_mode(False), torch.no_grad():
            return cast(Tensor, self.network(x, t, s, labels))
