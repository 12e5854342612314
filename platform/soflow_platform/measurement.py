"""Statistics of a set of images, gathered in blocks that are each complete or absent.

A measurement is a set of images, a feature network and the metrics wanted; its key is a digest of all that decides its numbers. Its
folder holds one file for each block that is done and, at the end, the whole in place of the blocks. Blocks are merged in order, so
that the result is the same whoever made them and however often it was cut.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from soflow_core.samplers.noise import sample_labels
from soflow_pipelines.features import FeatureNetwork
from soflow_pipelines.image_sets import ImageSet, PartOfImages, open_image_set
from soflow_pipelines.loader import ShardLoader
from soflow_pipelines.metrics import EVALUATOR, ScoreStatistics
from soflow_pipelines.writers import write_file
from soflow_platform.generator import BATCH, Generator
from soflow_platform.sampling import decoded, open_decoder

BLOCKS = 16
"""A small set is cut into about as many blocks."""
LARGEST_BLOCK = 1024
WHOLE = "statistics.npz"

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
class GivenImages:
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

    def open(self, device: str | torch.device) -> OpenedImages | OpenedSamples:
        """Open the place; UserError, SourceError or ShardError where it is none."""
        if not self.decodes:
            return OpenedSamples(self.place)
        decoder = open_decoder(self.data, self.autoencoder, device)
        images = open_image_set(self.place, self.resolution, decoder)
        return OpenedImages(images if len(images) == self.count else PartOfImages(images, self.count))


class OpenedImages:
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


class OpenedSamples:
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


@dataclass(frozen=True)
class Measurement:
    """What is gathered of which images. Plain data, so that it travels to any node."""

    images: GeneratedImages | GivenImages
    features: str
    """Name of the feature network."""
    features_id: str
    metrics: tuple[str, ...]
    shape: tuple[int, int, int] = (0, 0, 0)
    """(C, H, W) of samples in the training space, for features that look at it."""

    @property
    def key(self) -> str:
        """The same for the same statistics."""
        facts = {
            "evaluator": EVALUATOR,
            "images": self.images.facts(),
            "features": self.features_id,
            "metrics": self.metrics,
            "block": self.block,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    @property
    def block(self) -> int:
        """Images in one block: whole batches, so that no batch depends on the cut."""
        wanted = min(LARGEST_BLOCK, -(-self.images.count // BLOCKS))
        return max(1, -(-wanted // BATCH)) * BATCH

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.images.count // self.block)

    def size(self, block: int) -> int:
        """Images in this one."""
        return min(self.block, self.images.count - block * self.block)


@dataclass(frozen=True)
class MeasurementFolder:
    """Where the blocks of one measurement are kept."""

    folder: Path
    measurement: Measurement

    @classmethod
    def of(cls, measurement: Measurement, root: Path) -> MeasurementFolder:
        """Its folder below `root`; nothing is created."""
        return cls(root / measurement.key, measurement)

    def missing(self) -> list[int]:
        """Blocks that are still to be made."""
        if (self.folder / WHOLE).exists():
            return []
        return [block for block in range(self.measurement.blocks) if not self._path(block).exists()]

    def publish(self, block: int, statistics: ScoreStatistics) -> None:
        """Keep a block, complete or absent."""
        _save(self._path(block), statistics)

    def whole(self) -> ScoreStatistics:
        """The statistics of all blocks, merged in order; they are kept in place of the blocks."""
        path = self.folder / WHOLE
        if not path.exists():
            try:
                _save(path, self._merged())
            except FileNotFoundError:
                # Another command may have merged the blocks and removed them meanwhile.
                if not path.exists():
                    raise
        for block in range(self.measurement.blocks):
            self._path(block).unlink(missing_ok=True)
        return _load(path)

    def _merged(self) -> ScoreStatistics:
        whole = _load(self._path(0))
        for block in range(1, self.measurement.blocks):
            whole.merge(_load(self._path(block)))
        return whole

    def _path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.npz"


def measure_block(
    measurement: Measurement,
    block: int,
    opened: OpenedGenerator | OpenedImages | OpenedSamples,
    network: FeatureNetwork,
    count: Callable[[int], None] | None = None,
) -> ScoreStatistics:
    """The statistics of one block. ScoreError where a sample is refused; `count` hears of every batch."""
    statistics = ScoreStatistics(network, measurement.metrics, samples=measurement.images.count)
    first = block * measurement.block
    last = first + measurement.size(block)
    for start in range(first, last, BATCH):
        stop = min(start + BATCH, last)
        images, labels = opened.read(start, stop)
        statistics.update(torch.arange(start, stop), images, labels)
        if count is not None:
            count(stop - start)
    return statistics


def measure(measurement: Measurement, network: FeatureNetwork, device: str | torch.device) -> ScoreStatistics:
    """The statistics of all blocks, made in this process and merged in order; nothing is kept."""
    opened = measurement.images.open(device)
    with contextlib.closing(opened) if isinstance(opened, OpenedSamples) else contextlib.nullcontext():
        whole = measure_block(measurement, 0, opened, network)
        for block in range(1, measurement.blocks):
            whole.merge(measure_block(measurement, block, opened, network))
        return whole


def _save(path: Path, statistics: ScoreStatistics) -> None:
    content = io.BytesIO()
    np.savez(content, **statistics.state())  # type: ignore[arg-type]
    write_file(path, content.getvalue())


def _load(path: Path) -> ScoreStatistics:
    with np.load(path) as arrays:
        return ScoreStatistics.from_state(dict(arrays))
