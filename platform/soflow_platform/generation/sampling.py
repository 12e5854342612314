"""Samples of a network by index, and the settings by which a method is sampled as tags."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from soflow_core.objectives import Objective
from soflow_core.samplers.noise import sample_noise
from soflow_core.sampling_networks import SamplingNetwork
from soflow_core.settings import SAMPLING, marked


class SampleNoises(Sequence[Tensor]):
    """The noises of a batch, (B, C, H, W) each, drawn on access: a sampler of 1000 steps may need all or none."""

    def __init__(
        self, seed: int, indices: Tensor, shape: tuple[int, ...], count: int, device: torch.device
    ) -> None:
        self._seed, self._indices, self._shape = seed, indices, shape
        self._count, self._device = count, device

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, draw: int) -> Tensor: ...
    @overload
    def __getitem__(self, draw: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, draw: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(draw, slice):
            return [self[i] for i in range(*draw.indices(self._count))]
        if not 0 <= draw < self._count:
            raise IndexError(draw)
        # Draw 0 is the noise the sampler starts from.
        return sample_noise(self._seed, self._indices, self._shape, draw + 1).to(self._device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[draw] for draw in range(self._count))


@torch.inference_mode()
def generate(
    network: SamplingNetwork,
    objective: Objective,
    seed: int,
    indices: Tensor,
    labels: Tensor | None,
    steps: int,
    device: torch.device,
) -> Tensor:
    """Samples (B, C, H, W) float32 on the CPU; sample i is a function of (weights, seed, i, label, sampler, steps)."""
    shape = network.config.sample_shape
    noise = sample_noise(seed, indices, shape).to(device)
    labels = None if labels is None else labels.to(device)
    renoise = SampleNoises(seed, indices, shape, steps - 1, device)
    return objective.sample(network, noise, labels, steps, renoise).float().cpu()


def sampling_facts(objective: Objective) -> dict[str, str]:
    """The settings by which this method is sampled, as tags."""
    facts = {name: getattr(objective, name) for name in sorted(marked(objective, SAMPLING))}
    if objective.conditions_on_scale:
        facts["sampling_scale"] = objective.trained_guidance
    if objective.conditions_on_interval:
        facts["sampling_interval"] = objective.sampled_interval
    return {name: _as_tag(value) for name, value in facts.items() if value is not None}


def _as_tag(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
