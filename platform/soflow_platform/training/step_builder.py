"""soflow_platform.training.step_builder"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from soflow_core.networks import DiT, DiTConfig
from soflow_core.train_step import TrainStep
from soflow_platform.config.experiment import Experiment
from soflow_platform.training.distributed import _weighted_mean, all_gather_tensor, average_gradients, rows_of


def build_train_step(
    experiment: Experiment, config: DiTConfig, device: torch.device, world: int, rank: int = 0
) -> TrainStep:
    """Network with weights drawn from the seed, optimizer and EMAs; wrapped for several ranks.

    Where the batch does not divide, a rank's gradients count as many times as it has rows.
    """
    torch.manual_seed(experiment.seed)
    plain = DiT(config)
    network: nn.Module = plain
    training = experiment.training
    weight = rows_of(rank, world, training.batch) * world / training.batch
    # DistributedDataParallel lays its messages out anew after the first step, and a sum over 3 ranks or more depends on where in
    # a message a number lies: only one message of always the same order gives a resumed run the same bits.
    ordered = experiment.objective.uses_jvp or (training.deterministic and world > 2)
    reduces = world > 1 and ordered and training.parallel == "ddp"
    if training.parallel == "fsdp" and world > 1:
        from soflow_core.sharding import shard

        # Block by block from the CPU: no device need hold it whole.
        network = shard(plain, init_device_mesh(device.type, (world,)))
    else:
        plain.to(device)
    if world > 1 and not reduces and training.parallel == "ddp":
        network = DistributedDataParallel(plain, device_ids=[device] if device.type == "cuda" else None)
        if training.batch % world:
            # Annotations that are strings, as in this file, would be refused; a lambda has none.
            network.register_comm_hook(weight, lambda weight, bucket: _weighted_mean(weight, bucket))
    return TrainStep(
        network,
        experiment.objective,
        experiment.optimizer,
        total_steps=training.steps,
        ema_decays=training.ema,
        precision=training.precision,
        clip_norm=training.clip_norm,
        compile=training.compile,
        reduce_gradients=partial(average_gradients, weight=weight) if reduces else None,
        gather=all_gather_tensor if world > 1 and training.parallel == "ddp" else None,
        deterministic=training.deterministic,
        accumulate=training.accumulate,
    )
