"""soflow_platform.evaluation.image_sources"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from soflow_core.samplers.noise import sample_labels
from soflow_pipelines.references.image_sets import ImageSet, PartOfImages, open_image_set
from soflow_pipelines.shards.loader import ShardLoader
from soflow_platform.generation.decoding import decoded, open_decoder
from soflow_platform.generation.generator import BATCH, Generator

LabelMode = Literal["balanced", "uniform"]


@dataclass(frozen=True)
class GeneratedImages:
    """Images that a network makes."""

    weights: str
    digest: str
    """Of the weights."""
    steps: int
    seed: int
    labels: LabelMode
    count: int
    sampling: dict[str, Any] = field(default_factory=dict)
    """Settings of the method's sampler other than those it was trained with."""
    autoencoder: str | None = None
    """What decodes latents, where it is not the one that the weights name."""
    decodes: bool = True
    """False leaves samples in the training space, for features that look at it."""

    def facts(self) -> dict[str, Any]:
        """What decides the images; not where the weights lie."""
        facts = asdict(self)
        return {k: v for k, v in facts.items() if k not in ("weights", "autoencoder")}

    def open(self, device: str | torch.device) -> OpenedGenerator:
        """Load the network, and its decoder where its samples are latents."""
        generator = Generator.open(self.weights, self.sampling)
        decoder = open_decoder(generator.data, self.autoencoder, device) if self.decodes else None
        return OpenedGenerator(self, generator, decoder)


class OpenedGenerator:
    """An image set whose images are made when they are read."""

    def __init__(self, images: GeneratedImages, generator: Generator, decoder: Any) -> None:
        self._images, self._generator, self._decoder = images, generator, decoder

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Samples start to stop, in [-1, 1] or in the training space, and the labels they were asked for by."""
        images, classes = self._images, self._generator.classes
        indices = torch.arange(start, stop)
        labels = None
        if classes is not None:
            labels = sample_labels(images.seed, indices, classes, balanced=images.labels == "balanced")
        (made,) = self._generator.samples(indices, labels, images.seed, images.steps)
        return decoded(made, self._decoder), labels


@dataclass(frozen=True)
class StoredImages:
    """Images that are there: a folder, an .npz file, a shard set."""

    place: str
    digest: str
    """Of all images there."""
    count: int
    """How many are taken; where there are more, a fixed permutation chooses."""
    resolution: int | None = None
    """Side of the ADM centre crop; None takes them as they are."""
    autoencoder: str | None = None
    """What decodes a shard set of latents."""
    data: dict[str, Any] = field(default_factory=dict)
    """What is known of such a set."""
    decodes: bool = True
    """False leaves samples of a shard set in the training space, for features that look at it."""

    def facts(self) -> dict[str, Any]:
        """What decides the images; not where they lie."""
        return {
            "digest": self.digest,
            "count": self.count,
            "resolution": self.resolution,
            "decodes": self.decodes,
        }

    def open(self, device: str | torch.device) -> OpenedStoredImages | OpenedTrainingSamples:
        """Open the place; UserError, SourceError or ShardError where it is none."""
        if not self.decodes:
            return OpenedTrainingSamples(self.place)
        decoder = open_decoder(self.data, self.autoencoder, device)
        images = open_image_set(self.place, self.resolution, decoder)
        return OpenedStoredImages(images if len(images) == self.count else PartOfImages(images, self.count))


class OpenedStoredImages:
    """An image set as a measurement reads it."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images start to stop, uint8. Grey ones that were stored in three channels have one."""
        images = self._images.read(start, stop)
        if images.shape[1] == 3 and bool((images == images[:, :1]).all()):
            images = images[:, :1]
        labels = self._images.labels
        return images, None if labels is None else torch.from_numpy(labels[start:stop])


class OpenedTrainingSamples:
    """A shard set as a network sees it in its first epoch."""

    def __init__(self, place: str) -> None:
        self._loader = ShardLoader(place, batch_size=BATCH, threads=0)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Samples start to stop in the loader's order, float32, and their labels. At most BATCH at a time."""
        self._loader.consumed = start
        batch = next(self._loader)
        labels = None if batch.labels is None else batch.labels[: stop - start]
        return batch.x0[: stop - start], labels

    def close(self) -> None:
        """Stop what is fetched in the background."""
        self._loader.close()
