"""The real images that samples are scored against: the data a network was trained on, described once and kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from soflow_pipelines.autoencoders import KlAutoencoder
from soflow_pipelines.dataset_info import DatasetInfo
from soflow_pipelines.features import FeatureNetwork
from soflow_pipelines.loader import ShardLoader
from soflow_pipelines.metrics import Reference
from soflow_pipelines.references import cached_reference, open_reference, reference_from_images

REFERENCE_LIMIT = 50_000
"""Samples of a data set that reference statistics are taken of, at most."""

READ_AT_ONCE = 64

DECODED_LATENTS = (
    "The reference is of images decoded from the training latents, not of the images themselves: the distance leaves out what the "
    "autoencoder loses."
)


def short_digest(info: DatasetInfo) -> str:
    """Enough of the data's digest to tell sets apart in a file name or a tag."""
    return info.digest.rsplit(":", 1)[-1][:16]


def taken(samples: int) -> int | None:
    """How many samples of a set are taken: the first so many, or None for all of them."""
    return REFERENCE_LIMIT if samples > REFERENCE_LIMIT else None


def training_reference(
    features: FeatureNetwork,
    metrics: Iterable[str],
    info: DatasetInfo,
    data: str,
    decoder: KlAutoencoder | None,
    folder: Path,
) -> Reference:
    """Statistics of the training data, from `folder` or made in this process and kept there."""
    limit = taken(info.samples)
    if features.space == "images":
        return open_reference(data, features, metrics, folder, decoder=decoder, limit=limit)
    wanted = sorted(set(metrics))

    def make() -> Reference:
        return reference_from_images(training_samples(data, limit or info.samples), features, wanted, data)

    done = {"metrics": wanted, "limit": limit, "space": features.space}
    return cached_reference(folder, info.digest, features.id, done, make)


def training_samples(data: str, count: int) -> Iterator[Tensor]:
    """The first `count` samples of a set in the loader's order, as the network sees them: (B, C, H, W) float32."""
    with ShardLoader(data, batch_size=min(count, READ_AT_ONCE), threads=0) as loader:
        for start in range(0, count, READ_AT_ONCE):
            yield next(loader).x0[: count - start]


def reference_flags(data: Mapping[str, Any], features: FeatureNetwork) -> list[str]:
    """What has to be said of training data as a reference for numbers on these features."""
    decodes = data.get("kind") == "latents" and features.space == "images"
    return [DECODED_LATENTS] if decodes else []
