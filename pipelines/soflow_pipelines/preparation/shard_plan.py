"""Plan of a preparation: which images make which shard, a function of the source and the settings alone.

Each shard can therefore be built by another worker, and an interrupted preparation that is resumed writes the
same bytes as one that was not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from soflow_core.failures import InputError
from soflow_pipelines.images.codec import AutoencoderFacts
from soflow_pipelines.images.decode import centre_crop, to_array
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.order import philox_permutation
from soflow_pipelines.shards.writer import SHARD_BYTES, Sample, samples_per_shard
from soflow_pipelines.sources.hdf5 import EncodedSource
from soflow_pipelines.sources.source import Source


class PreparationError(InputError):
    """Settings of a preparation that are impossible, or do not fit the source or the autoencoder."""


@dataclass(frozen=True)
class PrepareSettings:
    """Settings that decide the bytes of the shards, together with the source and the autoencoder. Raises PreparationError."""

    resolution: int
    """Pixels of a side."""
    flips: bool = False
    """Whether each image is stored a second time, mirrored before it is encoded."""
    dtype: Literal["float16", "float32"] = "float16"
    """Floating-point type in which latents are stored."""
    seed: int = 0
    """Seed of the order in which images are distributed over shards."""
    shard_bytes: int = SHARD_BYTES
    batch: int = 32
    """Images encoded at once; rounding may depend on it."""
    skip_damaged: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 1 or self.shard_bytes < 1 or self.batch < 1:
            raise PreparationError("resolution, bytes of a shard and batch are 1 or more.")


class ShardPlan:
    """Which images of a source make which shard. Raises PreparationError where the autoencoder does not fit."""

    def __init__(
        self, source: Source, settings: PrepareSettings, autoencoder: AutoencoderFacts | None = None
    ) -> None:
        self.source = source
        self.settings = settings
        self.autoencoder = autoencoder
        self.encoded = source if isinstance(source, EncodedSource) else None
        """The source, where it holds latents already; they are stored as they are."""
        size = settings.resolution
        if self.encoded is not None:
            shape, size = _shape_of_latents(self.encoded, source.name, settings, autoencoder)
        elif autoencoder is None:
            shape = (source.channels, size, size)
        else:
            if source.channels != 3:
                raise PreparationError(
                    f"{autoencoder.id} encodes RGB images; {source.name} has {source.channels} channel."
                )
            if size % autoencoder.factor:
                raise PreparationError(
                    f"a resolution of {size} is no multiple of {autoencoder.factor}, as {autoencoder.id} needs."
                )
            shape = (autoencoder.channels, size // autoencoder.factor, size // autoencoder.factor)
        self.info = DatasetInfo(
            kind="pixels" if autoencoder is None else "latents",
            shape=shape,
            dtype="uint8" if autoencoder is None else settings.dtype,
            classes=None if source.labels is None else len(source.class_names),
            class_names=source.class_names,
            resolution=size,
            crop="adm-centre" if self.encoded is None else None,
            flips=settings.flips,
            autoencoder=autoencoder.id if autoencoder else None,
            autoencoder_digest=autoencoder.digest if autoencoder else None,
            scaling=autoencoder.scaling if autoencoder else 1.0,
            shift=autoencoder.shift if autoencoder else 0.0,
            recipe=self.recipe(),
        )
        self.samples = len(source) * (2 if settings.flips else 1)
        self._per_shard = samples_per_shard(self.info, self.samples, settings.shard_bytes)
        self._order = self._shuffle()

    def recipe(self) -> dict[str, Any]:
        """Everything that decides the bytes, as recorded in `dataset.json`."""
        return {
            "source": self.source.name,
            "images": len(self.source),
            "source_digest": self.source.digest,
            **asdict(self.settings),
            "autoencoder": self.autoencoder.id if self.autoencoder else None,
            "autoencoder_digest": self.autoencoder.digest if self.autoencoder else None,
        }

    def _shuffle(self) -> NDArray[np.int64]:
        """Items in the order in which they fill the shards: permuted, so that each shard has all classes.

        Where images are cheap to read only in blocks, blocks are permuted instead of images.
        """
        seed, ends = self.settings.seed, self.source.block_ends
        if ends is None:
            return philox_permutation(len(self.source), seed, 0, stream=0)
        starts = np.concatenate([[0], ends[:-1]])
        blocks = philox_permutation(len(ends), seed, 0, stream=0)
        return np.concatenate([np.arange(starts[block], ends[block]) for block in blocks])

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self._per_shard)

    def shard_samples(self, shard: int) -> range:
        """The numbers of a shard's samples in the shuffled order."""
        return range(shard * self._per_shard, min((shard + 1) * self._per_shard, self.samples))

    def place(self, sample: int) -> tuple[int, bool]:
        """(item of the source, whether mirrored) of a sample of the shuffled order."""
        if self.settings.flips:
            return int(self._order[sample // 2]), bool(sample % 2)
        return int(self._order[sample]), False

    def pixels(self, sample: int) -> NDArray[np.uint8]:
        """uint8 (C, H, W) of a sample, cropped and, for the second of two flips, mirrored. Raises ImageError."""
        item, mirrored = self.place(sample)
        image = centre_crop(self.source.image(item), self.settings.resolution)
        if mirrored:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_array(image)

    def array(self, sample: int) -> NDArray[Any]:
        """The pixels of a sample, or its moments (2C, h, w) float32 where the source holds latents. Raises ImageError."""
        if self.encoded is None:
            return self.pixels(sample)
        return self.encoded.moments(self.place(sample)[0])

    def sample(self, sample: int, array: NDArray[Any]) -> Sample:
        """A sample as it is stored: key, array and label."""
        item, mirrored = self.place(sample)
        label = None if self.source.labels is None else int(self.source.labels[item])
        return Sample(f"{item:08d}-flip" if mirrored else f"{item:08d}", array, label)


def _shape_of_latents(
    source: EncodedSource, name: str, settings: PrepareSettings, autoencoder: AutoencoderFacts | None
) -> tuple[tuple[int, int, int], int]:
    """(C, h, w) of stored latents, and the side of their images. Raises PreparationError."""
    twice, height, width = source.moments_shape
    if autoencoder is None:
        raise PreparationError(
            f"{name} holds latents: name the autoencoder that made them with --autoencoder."
        )
    if twice != 2 * autoencoder.channels:
        raise PreparationError(
            f"{name} holds latents of {twice // 2} channels, {autoencoder.id} makes {autoencoder.channels}: name the autoencoder "
            "that made them."
        )
    if settings.flips:
        raise PreparationError(f"{name} holds latents, which cannot be mirrored: leave --flips out.")
    return (twice // 2, height, width), height * autoencoder.factor
