"""Official CIFAR-10 checkpoints of SoFlow, whose network is the U-Net: architecture and tensors by the names in the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from soflow_core.failures import summarize
from soflow_core.guidance import Guidance
from soflow_core.networks import UNetConfig
from soflow_core.objectives import SoFlow
from soflow_core.weights import Weights, WeightsError

FIRST = re.compile(r"(?:.*\.)?enc\.(\d{1,5})x(\d{1,5})_conv\.weight")
"""The tensor whose name says the sides of an image."""
UNCONDITIONAL = Guidance(scale=1.0, mix=1.0, drop=0.0, decay_from=1.0)


def is_unet(names: Iterable[object]) -> bool:
    """Whether names of tensors are those of the U-Net."""
    return any(FIRST.fullmatch(str(name)) for name in names)


def unet_weights(tensors: Mapping[str, Tensor], path: str | Path) -> Weights:
    """The weights of a U-Net with two times, by their names without wrappers' prefixes.

    Dropout, which no tensor shows, is 0. Raises WeightsError for a network of one time, as EDM's own, and where names or shapes are
    those of another network.
    """
    try:
        config = infer_unet(tensors)
    except WeightsError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
    except (ValueError, LookupError, ZeroDivisionError) as error:
        raise WeightsError(f"{path} is not a U-Net of two times: {summarize(error)}") from error
    return Weights(config, SoFlow(guidance=UNCONDITIONAL), {}, dict(tensors))


def infer_unet(tensors: Mapping[str, Tensor]) -> UNetConfig:
    """Architecture of a U-Net by the names and shapes of its tensors."""
    sides = next(match for match in map(FIRST.fullmatch, tensors) if match is not None)
    height, width = int(sides[1]), int(sides[2])
    base, channels = tensors[f"enc.{height}x{width}_conv.weight"].shape[:2]
    multipliers: list[int] = []
    attention: list[int] = []
    blocks = 0
    while f"enc.{height >> len(multipliers)}x{width >> len(multipliers)}_block0.conv0.weight" in tensors:
        level = len(multipliers)
        name = f"enc.{height >> level}x{width >> level}_block"
        blocks = sum(f"{name}{number}.conv0.weight" in tensors for number in range(64))
        multipliers.append(tensors[f"{name}0.conv0.weight"].shape[0] // base)
        if f"{name}0.qkv.weight" in tensors:
            attention.append(height >> level)
        if min(height, width) >> level <= 1:
            break
    inputs = tensors["map_layer0.weight"].shape[1]
    labels, augment = tensors.get("map_label.weight"), tensors.get("map_augment.weight")
    if inputs == base:
        raise WeightsError("it is a U-Net of one time, as EDM's own are; only those with two times are known")
    return UNetConfig(
        channels,
        height,
        width,
        classes=None if labels is None else labels.shape[1],
        null_label=labels is not None,
        base=base,
        multipliers=tuple(multipliers),
        blocks=blocks,
        attention=tuple(attention),
        time_width=inputs // 2,
        resample=_taps(tensors),
        augmentations=0 if augment is None else augment.shape[1],
    )


def _taps(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Taps of the filters, as whole numbers over the smallest one. Raises WeightsError where filters differ."""
    filters = [tensor for name, tensor in tensors.items() if name.endswith(".resample_filter")]
    if not filters:
        return UNetConfig.resample
    if any(each.shape != filters[0].shape or not torch.equal(each, filters[0]) for each in filters):
        raise WeightsError("its layers resample with different filters, and one for all is all that is known")
    line = filters[0][0, 0].double().sum(dim=0)
    return tuple(round(float(tap)) for tap in line / line.abs().min())
