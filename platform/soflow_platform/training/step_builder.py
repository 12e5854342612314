"""Builds a trial's network and training step from its configuration, for one rank or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

from soflow_core.alignment import Alignment
from soflow_core.gradient_sync import DDP, FSDP, FlatAllReduce, GradientSync, Local
from soflow_core.networks import Architecture
from soflow_core.train_step import TrainStep, TrainStepConfig
from soflow_platform.config.experiment import Experiment
from soflow_platform.training.distributed import rows_of
from soflow_platform.training.start import Start


def build_train_step(
    experiment: Experiment,
    network_config: Architecture,
    device: torch.device,
    world: int,
    rank: int = 0,
    start: Mapping[str, Any] | None = None,
    alignment: Alignment | None = None,
) -> TrainStep:
    """The training step of a trial, with initial weights drawn from the experiment's seed, or those of `start`, as in `TrialJob`."""
    training = experiment.training
    sync = choose_sync(experiment, device, world, rank)
    torch.manual_seed(experiment.seed)
    network = network_config.build()
    if start is not None:
        Start(**start).apply(network, experiment.objective.method)
    if not isinstance(sync, FSDP):
        # FSDP moves a network from the CPU block by block, so that no device holds all of it.
        network.to(device)
    config = TrainStepConfig(
        total_steps=training.steps,
        optimizer=experiment.optimizer,
        ema_decays=training.ema,
        power_ema_widths=training.ema_profiles,
        ema_every=training.ema_every,
        augment=training.augment,
        precision=training.precision,
        clip_norm=training.clip_norm,
        accumulate=training.accumulate,
        recompute=training.recompute,
        compile=training.compile,
        # A trial of a sweep with graphs has a GPU; `run --local` and the costs of a comparison may have none, and do the same steps.
        graphs=training.graphs and device.type == "cuda",
        deterministic=training.deterministic,
        seed=experiment.seed,
    )
    return TrainStep(network, experiment.objective, config, sync, alignment)


def choose_sync(experiment: Experiment, device: torch.device, world: int, rank: int) -> GradientSync:
    """The method by which gradients are averaged over ranks."""
    training = experiment.training
    if world == 1:
        return Local()
    if training.parallel == "fsdp":
        return FSDP(init_device_mesh(device.type, (world,)))
    # Where the batch does not divide, a rank's gradients count as many times as it has rows.
    weight = rows_of(rank, world, training.batch) * world / training.batch
    # DDP rebuilds its buckets after the first step, and a sum over 3 ranks or more depends on the position of a
    # number in its bucket. A single all-reduce in a fixed order gives a resumed run the same bits.
    # It also takes the gradients of an alignment head, which stands beside the network that DDP wraps.
    if experiment.objective.uses_jvp or training.alignment.active or (training.deterministic and world > 2):
        return FlatAllReduce(weight)
    return DDP(weight)
