"""Images that a network generates, as plain data for a statistics job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from soflow_core.samplers.noise import sample_labels
from soflow_platform.generation.generator import Generator

LabelMode = Literal["balanced", "uniform"]


@dataclass(frozen=True)
class GeneratedImages:
    """Samples 0 to count - 1 of a network, sampled in one way."""

    weights: str
    digest: str
    """SHA-256 of the weights file."""
    steps: int
    seed: int
    labels: LabelMode
    count: int
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampler settings that differ from those of training."""
    autoencoder: str | None = None
    """Folder or id of the autoencoder that decodes latents; None: the one that the weights name."""
    decode_latents: bool = True
    """False leaves samples in the training space, for features of that space."""

    def cache_key_fields(self) -> dict[str, Any]:
        """Everything that decides the images, which the path of the weights file does not."""
        return {
            "digest": self.digest,
            "steps": self.steps,
            "seed": self.seed,
            "labels": self.labels,
            "count": self.count,
            "sampling": self.sampling,
            "decodes": self.decode_latents,
        }

    def open(self, device: str | torch.device) -> OpenedGenerator:
        """Load the network, and the decoder of its latents. Raises InputError where one cannot be had."""
        del device
        generator = Generator.open(self.weights, self.sampling, self.autoencoder, self.decode_latents)
        return OpenedGenerator(self, generator)


class OpenedGenerator:
    """An image set whose images are generated when they are read."""

    def __init__(self, images: GeneratedImages, generator: Generator) -> None:
        self._images = images
        self.generator = generator

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Samples start to stop, in [-1, 1] or in the training space, and the labels that they were generated for."""
        images, classes = self._images, self.generator.classes
        indices = torch.arange(start, stop)
        labels = None
        if classes is not None:
            labels = sample_labels(images.seed, indices, classes, balanced=images.labels == "balanced")
        return torch.cat(list(self.generator.decoded(indices, labels, images.seed, images.steps))), labels

    def close(self) -> None:
        """Does nothing: no file stays open."""
