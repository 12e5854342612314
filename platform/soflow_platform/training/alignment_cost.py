"""What `training.alignment` costs and what it fits, by the settings alone: the feature network is not opened."""

from __future__ import annotations

from dataclasses import dataclass

from soflow_core.alignment import WIDTH_FACTOR, head_flops, head_parameters
from soflow_core.networks import Architecture
from soflow_pipelines.features.registry import FEATURES
from soflow_platform.config.evaluation import POOLED
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import UserError
from soflow_platform.training.step_time import FLOAT, feature_flops

POOLED_SIDE = 8
"""Largest side of `pooled` features."""


def aligned_block(experiment: Experiment, network: Architecture) -> int:
    """The block behind which tokens are aligned: that of the settings, or the middle one.

    Raises UserError where the network has no such block.
    """
    block = experiment.training.alignment.block or -(-getattr(network, "depth", 1) // 2)
    try:
        network.block_tokens(block)
    except ValueError as error:
        raise UserError(f"training.alignment: {error}.") from None
    return block


def check_alignment(experiment: Experiment, kind: str) -> None:
    """Raises UserError where features of images are to be aligned with, and the data (`kind`) are latents."""
    settings = experiment.training.alignment
    if not settings.active or kind != "latents":
        return
    features = FEATURES.get(settings.features or "")
    if features is None or features.space == "images":
        raise UserError(
            f"training.alignment.features {settings.features} looks at images and the data are latents, which are not decoded in a "
            "step: align with `pooled`, train on pixels, or set training.alignment.weight to 0."
        )


@dataclass(frozen=True)
class AlignmentCost:
    """What alignment adds to a training."""

    image_flops: float = 0.0
    """For one image: the head forwards and backwards, and the feature network forwards."""
    parameters: int = 0
    """Of the head."""
    kept_bytes: float = 0.0
    """Of one sample, for the backward pass: input, output and target of the head, and its hidden layers before and after SiLU."""
    counted: bool = True
    """Whether these are known."""


def alignment_cost(experiment: Experiment, network: Architecture) -> AlignmentCost:
    """The cost of a trial's alignment; nothing where its weight is 0. Raises UserError where the network has no such block."""
    settings = experiment.training.alignment
    if not settings.active:
        return AlignmentCost()
    rows, columns, width = network.block_tokens(aligned_block(experiment, network))
    kind = FEATURES.get(settings.features or "")
    dim = None if kind is None else kind.width
    if settings.features == POOLED:
        dim = network.channels * min(network.height, POOLED_SIDE) * min(network.width, POOLED_SIDE)
    if kind is None or dim is None:
        return AlignmentCost(counted=False)
    tokens = rows * columns if kind.gives_patches else 1
    return AlignmentCost(
        3 * head_flops(width, dim, tokens) + feature_flops(settings.features or ""),
        head_parameters(width, dim),
        float(FLOAT * tokens * (width + 4 * WIDTH_FACTOR * width + 2 * dim)),
    )
