"""The real images that samples are scored against: the data a network was trained on, described once and kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from soflow_pipelines.autoencoders import KlAutoencoder
from soflow_pipelines.dataset_info import DatasetInfo
from soflow_pipelines.features import FeatureNetwork
from soflow_pipelines.loader import ShardLoader
from soflow_pipelines.metrics import METRICS, Reference
from soflow_pipelines.references import reference_from_images
from soflow_platform.sampling import decoded

REFERENCE_LIMIT = 50_000
"""Training samples that the reference statistics are taken of, at most."""

READ_AT_ONCE = 64

DECODED_LATENTS = (
    "The reference is of images decoded from the training latents, not of the images themselves: the distance leaves out what the "
    "autoencoder loses."
)


def short_digest(info: DatasetInfo) -> str:
    """Enough of the data's digest to tell sets apart in a file name or a tag."""
    return info.digest.rsplit(":", 1)[-1][:16]


def reference_path(
    folder: Path, info: DatasetInfo, features: FeatureNetwork, decoder: KlAutoencoder | None
) -> Path:
    """Where the statistics of a data set are kept: by data, feature network and what decodes."""
    parts = [short_digest(info), features.id, *([decoder.facts.digest[:8]] if decoder is not None else [])]
    return folder / f"real-{re.sub(r'[^A-Za-z0-9._=-]+', '_', '-'.join(parts))}.npz"


def reference_name(info: DatasetInfo, count: int) -> str:
    """A data set as the tags of a number name it."""
    return f"{short_digest(info)} ({count} samples)"


def holds(reference: Reference, metrics: Iterable[str]) -> bool:
    """Whether these statistics are enough for these metrics."""
    needs = {METRICS[name].gathers for name in metrics if METRICS[name].compares}
    has = {
        "moments": reference.moments is not None,
        "spatial": reference.spatial is not None,
        "reservoir": reference.samples is not None,
    }
    return all(has[need] for need in needs)


def training_reference(
    features: FeatureNetwork,
    metrics: Iterable[str],
    info: DatasetInfo,
    data: str,
    decoder: KlAutoencoder | None,
    folder: Path,
) -> Reference:
    """Statistics of the training data, from `folder` or made in this process and kept there."""
    path = reference_path(folder, info, features, decoder)
    if path.exists():
        kept = Reference.load(path)
        if holds(kept, metrics):
            return kept
    count = min(info.samples, REFERENCE_LIMIT)
    images = training_images(data, info, count, decoder if features.space == "images" else None)
    reference = reference_from_images(images, features, metrics, reference_name(info, count))
    reference.save(path)
    return reference


def training_images(
    data: str, info: DatasetInfo, count: int, decoder: KlAutoencoder | None
) -> Iterator[Tensor]:
    """The first `count` samples of a set in the loader's order, or images decoded of them, (B, C, H, W) float32."""
    del info
    with ShardLoader(data, batch_size=min(count, READ_AT_ONCE), threads=0) as loader:
        for start in range(0, count, READ_AT_ONCE):
            yield decoded(next(loader).x0[: count - start], decoder)


def reference_flags(info: dict[str, Any], features: FeatureNetwork) -> list[str]:
    """What has to be said of the training data as a reference for numbers on these features."""
    decodes = info.get("kind") == "latents" and features.space == "images"
    return [DECODED_LATENTS] if decodes else []
