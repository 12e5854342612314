"""The real images that samples are scored against: where they are, described once and kept, and what has to be said of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from soflow_pipelines.features import FeatureNetwork
from soflow_pipelines.metrics import Reference, ScoreStatistics
from soflow_pipelines.metrics.reservoir import fixed_subset
from soflow_pipelines.metrics.score_statistics import format_size
from soflow_pipelines.references.image_sets import NpzImages, SourceImages, shard_images_digest
from soflow_pipelines.references.reference_statistics import cached_reference, npz_path
from soflow_pipelines.shards.info import INFO_NAME, DatasetInfo
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import absolute_source, open_source, source_path
from soflow_pipelines.sources.source import Source, SourceError
from soflow_pipelines.storage.opening import open_storage
from soflow_platform.evaluation.image_sources import StoredImages
from soflow_platform.evaluation.statistics import StatisticsJob
from soflow_platform.generation.decoding import open_decoder

ComputeStatistics = Callable[[StatisticsJob], ScoreStatistics]
"""Has the statistics of a set of images made where they are missing."""

PROBED = 16
"""Images of a folder whose sizes are looked at before all are read."""

DECODED_LATENTS = (
    "The reference is of images decoded from the training latents, not of the images themselves: the distance leaves out what the "
    "autoencoder loses."
)


def short_digest(info: DatasetInfo) -> str:
    """Enough of the data's digest to tell sets apart in a file name or a tag."""
    return info.digest.rsplit(":", 1)[-1][:16]


def training_reference(
    name: str,
    features: FeatureNetwork,
    metrics: Iterable[str],
    info: DatasetInfo,
    data: str,
    autoencoder: str | None,
    folder: Path,
    gather: ComputeStatistics,
) -> Reference:
    """Statistics of all training data, as images or as the network sees them; from `folder`, or gathered and kept there."""
    given = stored_shard_set(data, info, autoencoder, decodes=features.space == "images")
    return images_reference(given, name, features, metrics, folder, gather)


def images_reference(
    given: StoredImages,
    name: str,
    features: FeatureNetwork,
    metrics: Iterable[str],
    folder: Path,
    gather: ComputeStatistics,
) -> Reference:
    """Statistics of images that are there, on the features of this name; from `folder`, or gathered and kept there."""
    shape = tuple(given.data.get("shape", (0, 0, 0)))
    measurement = StatisticsJob(given, name, features.id, tuple(metrics), shape)

    def make() -> Reference:
        return Reference.of(gather(measurement), given.place)

    return cached_reference(folder, given.digest, features.id, measurement.metrics, make)


def stored_images(
    place: str, autoencoder: str | None = None, size: tuple[int, int] | None = None
) -> StoredImages:
    """All images of a folder or archive, of an .npz file or of a shard set.

    Images of a folder that are larger than `size` (H, W), where it is given, are cropped to it as ADM does. SourceError where they
    are smaller, UserError where the autoencoder is not the one that made a set of latents.
    """
    if is_shard_set(place):
        info = read_info(place)
        open_decoder(asdict(info), autoencoder, "cpu")
        return stored_shard_set(place, info, autoencoder)
    if place.endswith(".npz"):
        path = npz_path(place).absolute()
        npz = NpzImages(path)
        return StoredImages(str(path), npz.digest, len(npz))
    where = absolute_source(place)
    source = open_source(where)
    crop = None if size is None else _crop(source, size)
    listed = [SourceImages(source, crop).digest, _last_changed(source_path(where))]
    return StoredImages(where, hashlib.sha256(repr(listed).encode()).hexdigest(), len(source), crop)


def stored_shard_set(
    place: str, info: DatasetInfo, autoencoder: str | None, decodes: bool = True
) -> StoredImages:
    """All images of a shard set, latents decoded; or all samples as a network sees them, where `decodes` is False."""
    digest = shard_images_digest(info) if decodes else info.digest
    return StoredImages(place, digest, info.samples, None, autoencoder, asdict(info), decodes)


def _crop(source: Source, size: tuple[int, int]) -> int | None:
    """The side of the crop that gives images this size, None where they have it already."""
    probed = fixed_subset(len(source), PROBED).tolist()
    found = SourceImages(source).sizes(probed)
    height, width = size
    if found == {size}:
        return None
    if height != width:
        other = next(each for each in found if each != size)
        raise SourceError(
            f"{source.name} has images of {format_size(other)}, the samples are {format_size(size)}, and crops are square: take a "
            "reference of the samples' size."
        )
    cropped = SourceImages(source, height)
    for item in probed:
        # One that is too small is refused here, before anything is made.
        cropped.read(item, item + 1)
    return height


def _last_changed(root: Path) -> list[tuple[str, int]]:
    """When each file of a folder, or an archive, was written: names and sizes say too little of the images."""
    files = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names]
    return [(str(path.relative_to(root)), path.stat().st_mtime_ns) for path in sorted(files or [root])]


def is_shard_set(place: str) -> bool:
    """Whether a shard set lies there. A remote place is one or nothing, and says itself what is wrong with it."""
    if place.endswith(".npz"):
        return False
    return "://" in place or open_storage(place).size(INFO_NAME) is not None


def holds_latents(place: str) -> bool:
    """Whether a shard set of latents lies there."""
    return is_shard_set(place) and read_info(place).kind == "latents"


def reference_flags(data: Mapping[str, Any], features: FeatureNetwork) -> list[str]:
    """What has to be said of training data as a reference for numbers on these features."""
    decodes = data.get("kind") == "latents" and features.space == "images"
    return [DECODED_LATENTS] if decodes else []
