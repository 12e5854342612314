"""Checks of `training.graphs` and `training.recompute` against the other settings: what cannot be recorded, or run again."""

from __future__ import annotations

from typing import Any

from soflow_core.networks import Architecture
from soflow_core.objectives import Objective
from soflow_platform.config.training import ResourcesConfig, TrainingConfig


def obstacle_to_graphs(
    training: TrainingConfig, resources: ResourcesConfig, network: Any, objective: Objective
) -> str | None:
    """Why the passes of a training step cannot be recorded, and what to do; None where they can.

    A replay repeats what the host has said and sent in the recorded step.
    """
    if resources.gpus_per_worker == 0:
        return "records the work of a GPU, and a worker has none: raise resources.gpus_per_worker above 0"
    if resources.workers > 1:
        return f"records the passes of one worker, and resources.workers is {resources.workers}: set it to 1"
    by_host = {
        "training.augment": training.augment is not None,
        "training.alignment": training.alignment.active,
        "network.dropout": getattr(network, "dropout", 0) > 0,
    }
    for setting, used in by_host.items():
        if used:
            return f"does not go with {setting}: leave it out"
    if objective.schedules(0, training.steps) is None:
        return f"needs a method that says what changes from step to step: define `schedules` of {objective.method}"
    return None


def obstacle_to_recompute(architecture: type[Architecture], objective: Objective) -> str | None:
    """Why a network's blocks cannot be run again in the backward pass; None where they can."""
    if not architecture.recomputes:
        return f"runs the blocks of a network again, which the kind {architecture.kind} has none of"
    if objective.uses_jvp:
        return f"does not go with {objective.method}, whose Jacobian-vector product torch does not carry through them"
    return None
