"""From noise to what a user sees: samples of a network, the settings that act on them, and their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from soflow_core.networks import DiT
from soflow_core.objectives import Objective
from soflow_core.samplers.noise import sample_noise
from soflow_pipelines.autoencoders import AutoencoderError, AutoencoderFacts, KlAutoencoder, load_autoencoder
from soflow_pipelines.images import to_uint8
from soflow_platform.errors import UserError

SAMPLING_SETTINGS = ("sampler", "sampling_scale")
"""Settings of a method that act at sampling alone, so that a trained network can be sampled with others."""

DECODED_AT_ONCE = 8
"""Latents decoded in one call: the activations of a decoder are large."""


class SampleNoises(Sequence[Tensor]):
    """The noises of a batch, (B, C, H, W) each, made when they are asked for: a sampler of 1000 steps may need all or none."""

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
    network: DiT,
    objective: Objective,
    seed: int,
    indices: Tensor,
    labels: Tensor | None,
    steps: int,
    device: torch.device,
) -> Tensor:
    """Samples (B, C, H, W) float32 on the CPU; sample i is a function of (weights, seed, i, label, sampler, steps)."""
    config = network.config
    shape = (config.channels, config.height, config.width)
    noise = sample_noise(seed, indices, shape).to(device)
    labels = None if labels is None else labels.to(device)
    renoise = SampleNoises(seed, indices, shape, steps - 1, device)
    return objective.sample(network, noise, labels, steps, renoise).float().cpu()


def with_sampling(objective: Objective, settings: Mapping[str, Any]) -> Objective:
    """The same method, sampled with other settings. Raises UserError for one it does not have, or that cannot be."""
    known = {field.name for field in dataclasses.fields(objective)} & set(SAMPLING_SETTINGS)  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            has = f"it has {', '.join(sorted(known))}" if known else "it has one way of sampling"
            raise UserError(f"{objective.method} has no sampling setting `{name}`: {has}.")
    if not settings:
        return objective
    try:
        kind = TypeAdapter(type(objective))
        return kind.validate_python({**dataclasses.asdict(objective), **settings})  # type: ignore[call-overload]
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        name = ".".join(str(part) for part in first["loc"])
        what = f"`{name}` is {first['input']!r}: " if name else ""
        raise UserError(f"{objective.method}: {what}{said[:1].lower()}{said[1:]}.") from None


def sampling_facts(objective: Objective) -> dict[str, str]:
    """The settings by which this method is sampled, in words."""
    return {name: str(getattr(objective, name)) for name in SAMPLING_SETTINGS if hasattr(objective, name)}


def open_decoder(
    data: Mapping[str, Any], autoencoder: str | None, device: str | torch.device
) -> KlAutoencoder | None:
    """What turns samples into images: nothing for pixels, for latents the autoencoder they were made with.

    `data` is what is known of the training data; `autoencoder` a folder or an id to use in place of its own. Raises UserError where
    there is none or it is another.
    """
    if data.get("kind") != "latents":
        return None
    name = autoencoder or data.get("autoencoder")
    try:
        decoder = load_autoencoder(str(name), device)
    except AutoencoderError as error:
        raise UserError(f"{error} Name its folder as the autoencoder.") from error
    if decoder.facts.digest != data.get("autoencoder_digest"):
        raise UserError(
            f"the latents are of {data.get('autoencoder')} ({data.get('autoencoder_digest')}), the autoencoder named is "
            f"{decoder.facts.id} ({decoder.facts.digest}): name the one that made them."
        )
    return decoder


def autoencoder_tag(facts: AutoencoderFacts) -> str:
    """An autoencoder as the tags of a number name it."""
    return f"{facts.id} ({facts.digest})"


def decoded(samples: Tensor, decoder: KlAutoencoder | None) -> Tensor:
    """Samples (B, C, H, W) as the network makes them -> images in [-1, 1] (B, C', H', W')."""
    if decoder is None:
        return samples
    return torch.cat([decoder.decode(part) for part in samples.split(DECODED_AT_ONCE)])


def viewable(samples: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1], or latents -> uint8 images; of latents, their first three channels."""
    if samples.shape[1] not in (1, 3):
        samples = (samples[:, :3] / 3).clamp(-1, 1)
    return to_uint8(samples)
