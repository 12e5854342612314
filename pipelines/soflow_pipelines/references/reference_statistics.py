"""Computes reference statistics of images and of ADM's reference batches, and caches them in files by what decides them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.metrics.accumulators import ScoreError
from soflow_pipelines.metrics.fid import GaussianMoments
from soflow_pipelines.metrics.reference import Reference
from soflow_pipelines.metrics.registry import METRICS
from soflow_pipelines.metrics.score_statistics import RESERVOIR, ScoreStatistics
from soflow_pipelines.metrics.version import EVALUATOR
from soflow_pipelines.references.image_sets import DAMAGES, ImageSet, NpzImages, batches, opened_npz
from soflow_pipelines.sources.source import SourceError

INCEPTION = "inception-"
"""Prefix of the Inception network's ids."""

FAST_MANIFOLD = 2**38
"""Multiplications that one core does in two minutes. The radii of larger manifolds are left to a process's first score, which may have
a GPU.
"""

ADM_ARRAYS = {"moments": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
"""ADM's names for the mean and covariance of the features, and of sFID's."""


def reference_from_images(
    images: Iterable[Tensor],
    network: FeatureNetwork,
    metrics: Iterable[str],
    name: str,
    reservoir: int = RESERVOIR,
) -> Reference:
    """Statistics of batches of images (B, C, H, W), for those of the metrics that compare with a reference.

    Raises ScoreError where there are none, where their sizes differ or a value is not finite.
    """
    compared = compared_metrics(metrics)
    statistics = ScoreStatistics(network, compared, reservoir=reservoir)
    for batch in images:
        start = statistics.count
        statistics.update(torch.arange(start, start + len(batch)), batch)
    if not statistics.count:
        raise ScoreError(f"the reference {name} holds no images.")
    return Reference.of(statistics, name)


def reference_from_set(images: ImageSet, network: FeatureNetwork, metrics: Iterable[str]) -> Reference:
    """Statistics of a set of images: a folder, an archive, an .npz file, a shard set."""
    return reference_from_images(batches(images), network, metrics, images.name)


def reference_from_adm(
    path: Path,
    network: FeatureNetwork,
    metrics: Iterable[str],
    describe: Callable[[NpzImages, list[str]], Reference] | None = None,
) -> Reference:
    """ADM's reference batch: the statistics mu, sigma, mu_s, sigma_s of the file, the rest computed from its images `arr_0`.

    The statistics are those of the published Inception. For another network they are left out, and everything is taken of the
    images. `describe` computes the reference of all images for some metrics; without it this process does. Raises ScoreError where
    neither gives what the metrics need.
    """
    compared = compared_metrics(metrics)
    arrays = _adm_arrays(path)
    stated = {} if not network.id.startswith(INCEPTION) else _stated_moments(path, arrays, compared)
    if stated and network.warnings:
        raise ScoreError(
            f"{path.name} holds statistics of the published Inception, the weights in use are others: {network.id}."
        )
    rest = [metric for metric in compared if METRICS[metric].accumulator.name not in stated]
    images = NpzImages(path) if "arr_0" in arrays else None
    if not rest:
        resolution = None if images is None else images.resolution
        return Reference(path.name, network.id, resolution, None, **stated, warnings=network.warnings)
    if images is None:
        raise ScoreError(
            f"{path.name} has neither images nor statistics of {network.id} for {rest[0]}; it holds {', '.join(arrays)}."
        )
    seen = describe(images, rest) if describe is not None else reference_from_set(images, network, rest)
    parts: dict[str, Any] = {"moments": seen.moments, "spatial": seen.spatial} | stated
    count = None if stated else seen.count
    return Reference(path.name, network.id, seen.resolution, count, samples=seen.samples, **parts)


def cached_reference(
    folder: Path, digest: str, features: str, metrics: Iterable[str], make: Callable[[], Reference]
) -> Reference:
    """The reference of the data with this digest for these metrics, from `folder`; made and written there where it is missing.

    The digest is of the data and of what was done to them, such as a crop; the key also holds all else that the statistics depend on.
    """
    kept = [EVALUATOR, RESERVOIR, sorted(set(metrics))]
    described = json.dumps([digest, features, kept])
    key = hashlib.sha256(described.encode()).hexdigest()[:8]
    path = Path(folder) / f"reference-{digest.rsplit(':', 1)[-1][:16]}-{features}-{key}.npz"
    if not path.exists():
        make().save(path)
    reference = Reference.load(path)
    if reference.radii is None and 0 < _manifold_work(reference, metrics) <= FAST_MANIFOLD:
        reference.manifold()
        reference.save(path)
    return reference


def _manifold_work(reference: Reference, metrics: Iterable[str]) -> int:
    """Multiplications for the radii of the reference's samples, 0 where no metric asks for them."""
    if reference.samples is None or not {"precision", "recall"} & set(metrics):
        return 0
    count, dim = reference.samples.shape
    return count * count * dim


def compared_metrics(metrics: Iterable[str]) -> list[str]:
    """The metrics that compare with a reference; an unknown name stays, to be refused by name."""
    return [metric for metric in metrics if metric not in METRICS or METRICS[metric].compares]


def _adm_arrays(path: Path) -> list[str]:
    with opened_npz(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
    if not {"arr_0", "mu"} & set(names):
        raise SourceError(
            f"{path} is no reference: it has neither images (arr_0) nor statistics (mu, sigma), but {', '.join(names)}."
        )
    return names


def _stated_moments(path: Path, arrays: list[str], metrics: Iterable[str]) -> dict[str, Any]:
    """Those moments that are in the file and that a metric needs."""
    found: dict[str, Any] = {}
    for part in {METRICS[metric].accumulator.name for metric in metrics} & set(ADM_ARRAYS):
        names = ADM_ARRAYS[part]
        if set(names) <= set(arrays):
            try:
                with np.load(path) as content:
                    mean, covariance = (_float64(content[name]) for name in names)
                found[part] = GaussianMoments(mean, covariance)
            except DAMAGES as error:
                raise SourceError(f"{path}: {' and '.join(names)} are damaged: {error}.") from error
    return found


def _float64(array: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(array, np.float64)
