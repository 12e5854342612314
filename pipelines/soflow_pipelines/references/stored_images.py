"""Images that exist already, as plain data for a statistics job: a folder, an archive, an .npz file, a shard set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from soflow_pipelines.metrics.reservoir import fixed_subset
from soflow_pipelines.metrics.score_statistics import format_size
from soflow_pipelines.references.image_sets import (
    ImageSet,
    NpzImages,
    PartOfImages,
    SourceImages,
    is_shard_set,
    npz_path,
    open_image_set,
    shard_images_digest,
)
from soflow_pipelines.references.latent_decoder import open_decoder
from soflow_pipelines.references.statistics_job import BATCH
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.loader import ShardLoader
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.listing import UNREADABLE, list_folder
from soflow_pipelines.sources.opening import absolute_source, open_source, source_path
from soflow_pipelines.sources.source import Source, SourceError

PROBED = 16
"""Number of images of a folder whose sizes are checked before all are read."""


@dataclass(frozen=True)
class StoredImages:
    """A set of images that exists already."""

    place: str
    digest: str
    """Digest of all images of the set."""
    count: int
    """Images that are taken; where the set has more, a fixed permutation chooses."""
    resolution: int | None = None
    """Side of the ADM centre crop; None takes the images as they are."""
    autoencoder: str | None = None
    """Folder or id of the autoencoder for a shard set of latents; None: the one its description names."""
    info: DatasetInfo | None = None
    """Description of a shard set."""
    decode_latents: bool = True
    """False leaves samples of a shard set in the training space, for features of that space."""

    def cache_key_fields(self) -> dict[str, Any]:
        """Everything that decides the images, which their location does not."""
        return {
            "digest": self.digest,
            "count": self.count,
            "resolution": self.resolution,
            "decodes": self.decode_latents,
        }

    def open(self, device: str | torch.device) -> OpenedStoredImages | OpenedTrainingSamples:
        """Open the place. Raises InputError where it holds no images, or its latents cannot be decoded."""
        if not self.decode_latents:
            return OpenedTrainingSamples(self.place)
        images = open_image_set(
            self.place, self.resolution, open_decoder(self.info, self.autoencoder, device)
        )
        return OpenedStoredImages(images if len(images) == self.count else PartOfImages(images, self.count))


class OpenedStoredImages:
    """An image set as a statistics job reads it."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images start to stop, uint8. Grey ones that were stored in three channels have one."""
        images = self._images.read(start, stop)
        if images.shape[1] == 3 and bool((images == images[:, :1]).all()):
            images = images[:, :1]
        labels = self._images.labels
        return images, None if labels is None else torch.from_numpy(labels[start:stop])

    def close(self) -> None:
        """Does nothing: no file stays open."""


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
        """Stop fetching in the background."""
        self._loader.close()


def stored_images(
    place: str, autoencoder: str | None = None, size: tuple[int, int] | None = None
) -> StoredImages:
    """All images of a folder or archive, of an .npz file or of a shard set, latents decoded.

    Images of a folder that are larger than `size` (H, W), where it is given, are cropped to it as ADM does. Raises SourceError where
    they are smaller, AutoencoderError where the autoencoder is not the one that made a set of latents.
    """
    if is_shard_set(place):
        info = read_info(place)
        open_decoder(info, autoencoder, "cpu")
        return stored_shard_set(place, info, autoencoder)
    if place.endswith(".npz"):
        path = npz_path(place).absolute()
        npz = NpzImages(path)
        return StoredImages(str(path), npz.digest, len(npz))
    location = absolute_source(place)
    source = open_source(location)
    crop = None if size is None else _crop(source, size)
    listed = [SourceImages(source, crop).digest, _modification_times(source_path(location))]
    return StoredImages(location, hashlib.sha256(repr(listed).encode()).hexdigest(), len(source), crop)


def stored_shard_set(
    place: str, info: DatasetInfo, autoencoder: str | None, decode_latents: bool = True
) -> StoredImages:
    """All images of a shard set, latents decoded; or all samples as a network sees them, where `decode_latents` is False."""
    digest = shard_images_digest(info) if decode_latents else info.digest
    return StoredImages(place, digest, info.samples, None, autoencoder, info, decode_latents)


def holds_latents(place: str) -> bool:
    """Whether the location is a shard set of latents."""
    return is_shard_set(place) and read_info(place).kind == "latents"


def _crop(source: Source, size: tuple[int, int]) -> int | None:
    """The side of the crop that gives images this size, None where they have it already."""
    probed = fixed_subset(len(source), PROBED).tolist()
    sizes = SourceImages(source).sizes(probed)
    height, width = size
    if sizes == {size}:
        return None
    if height != width:
        other = next(each for each in sizes if each != size)
        raise SourceError(
            f"{source.name} has images of {format_size(other)}, the samples are {format_size(size)}, and crops are square: take a "
            "reference of the samples' size."
        )
    cropped = SourceImages(source, height)
    for item in probed:
        # One that is too small is refused here, before anything is computed.
        cropped.read(item, item + 1)
    return height


def _modification_times(root: Path) -> list[tuple[str, int]]:
    """When each file of a folder, or an archive, was written: files that were replaced may keep their names and sizes."""
    if not root.is_dir():
        return [(".", root.stat().st_mtime_ns)]
    times = []
    for path, size in list_folder(root).files:
        times.append((path, 0 if size == UNREADABLE else (root / path).stat().st_mtime_ns))
    return times
