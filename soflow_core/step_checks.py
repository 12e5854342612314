"""Checks of what a training step is made of: objective, network, gradient exchange, and a state to go on from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from soflow_core.gradient_sync import DDP, FSDP, FlatAllReduce, GradientSync, Local
from soflow_core.networks.base import NetworkModule
from soflow_core.objectives.base import Objective
from soflow_core.sharding import sharding_mesh


def check_shapes(state: Mapping[str, Tensor], current: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a state is that of another network than the current one."""
    for name in sorted(state.keys() | current.keys()):
        stored, expected = state.get(name), current.get(name)
        if stored is None or expected is None or stored.shape != expected.shape:
            shapes = [None if tensor is None else tuple(tensor.shape) for tensor in (stored, expected)]
            raise ValueError(
                f"{name} is {shapes[0]} in the state and {shapes[1]} in the network; build the same network"
            )


def check_conditions(objective: Objective, module: nn.Module) -> None:
    """Raises ValueError where the network lacks a condition of the objective (null label, guidance scale), or differs in its heads."""
    if not isinstance(module, NetworkModule):
        return
    if objective.uses_velocity_head != module.config.has_velocity_head:
        has = "has" if module.config.has_velocity_head else "lacks"
        raise ValueError(
            f"{objective.method} with these settings {'needs' if objective.uses_velocity_head else 'does not train'} a second head for "
            f"the velocity, and this network {has} one: set velocity_head of the method and velocity_blocks of the network alike"
        )
    if module.config.classes is None:
        return
    if objective.conditions_on_scale != module.config.guidance_scale:
        needed = objective.conditions_on_scale
        raise ValueError(
            f"{objective.method} with these settings needs a network with guidance_scale={needed} in its architecture"
        )
    if objective.conditions_on_interval != module.config.guidance_interval:
        raise ValueError(
            f"{objective.method} with these settings needs a network with guidance_interval={objective.conditions_on_interval} in its "
            "architecture"
        )
    if objective.needs_null_label and not module.config.null_label:
        raise ValueError(
            f"{objective.method} drops labels or guides, and this network has no null label; build it with null_label=True"
        )


def check_combination(
    objective: Objective, network: nn.Module, sync: GradientSync, aligned: bool, augmented: bool
) -> None:
    """Raises ValueError where the network is wrapped already, where the wrapper loses a derivative or an alignment head, or where a
    method that compares images cannot have all of them as they are trained on.
    """
    if objective.compares_images and augmented:
        raise ValueError(
            f"{objective.method} compares the images of a batch, which augmentation changes one by one: turn augmentation off"
        )
    if objective.compares_images and isinstance(sync, DDP | FlatAllReduce) and sync.weight != 1:
        raise ValueError(
            f"{objective.method} compares the images of all ranks, which need equally many rows: give a batch that the ranks divide"
        )
    if aligned and isinstance(sync, DDP | FSDP):
        raise ValueError(
            f"{type(sync).__name__} exchanges the gradients of the network alone, not those of an alignment head; use FlatAllReduce"
        )
    if isinstance(network, DistributedDataParallel) or sharding_mesh(network) is not None:
        raise ValueError(
            "the network is wrapped for several ranks already; pass the plain one, and its wrapper as sync"
        )
    if objective.uses_jvp and not sync.carries_jvp:
        raise ValueError(
            f"{objective.method} takes a Jacobian-vector product, which {type(sync).__name__} does not carry;"
            " use FlatAllReduce or FSDP"
        )


def check_recompute(objective: Objective, network: nn.Module) -> None:
    """Raises ValueError where blocks cannot be run again in the backward pass."""
    if not isinstance(network, NetworkModule) or not network.config.recomputes:
        raise ValueError(
            "recompute runs the blocks of a network again, and this one has none that can: turn it off"
        )
    if objective.uses_jvp:
        raise ValueError(
            f"{objective.method} takes a Jacobian-vector product, which torch carries through no recomputed blocks: turn recompute off"
        )


def check_graphs(
    objective: Objective, device: torch.device, sync: GradientSync, drawn_by_host: Mapping[str, bool]
) -> None:
    """Raises ValueError where the passes of a step cannot be recorded: a replay repeats what the host has said and sent.

    `drawn_by_host` says of each option that the host has a part in whether it is on.
    """
    if device.type != "cuda":
        raise ValueError(f"graphs records the work of a GPU, and the network is on {device}: turn graphs off")
    if not isinstance(sync, Local):
        raise ValueError("graphs records the passes of one worker, and there are several: turn graphs off")
    for option, used in drawn_by_host.items():
        if used:
            raise ValueError(f"graphs does not go with {option}: turn one of them off")
    if objective.schedules(0, 1) is None:
        raise ValueError(
            f"{objective.method} does not say what changes from step to step, so that its steps cannot be recorded: define its "
            "`schedules`, or turn graphs off"
        )
