"""What images are scored by: a feature network, the metrics taken on it, and the real images they are compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from soflow_pipelines.features import FeatureNetwork
from soflow_pipelines.images.autoencoder import AutoencoderFacts
from soflow_pipelines.metrics import EVALUATOR, METRICS, Reference, ScoreResult, ScoreStatistics, scores
from soflow_pipelines.metrics.registry import select_metrics
from soflow_pipelines.metrics.scores import check_size
from soflow_pipelines.preparation.builtin import BUILTIN, ensure_builtin
from soflow_pipelines.references.image_sets import NpzImages
from soflow_pipelines.references.reference_statistics import cached_reference, npz_path, reference_from_adm
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.shards.tables import read_info
from soflow_pipelines.sources.opening import absolute_source
from soflow_pipelines.storage.files import sha256
from soflow_platform.config.evaluation import DIGITS
from soflow_platform.errors import UserError
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.evaluation.image_sources import StoredImages
from soflow_platform.evaluation.reference_store import (
    ComputeStatistics,
    images_reference,
    is_shard_set,
    reference_flags,
    stored_images,
    training_reference,
)
from soflow_platform.evaluation.statistics import StatisticsJob
from soflow_platform.generation.decoding import autoencoder_tag, open_decoder
from soflow_platform.storage.project import ProjectFolder


@dataclass(frozen=True)
class ReferenceLocation:
    """Where the images of a reference are."""

    place: str
    autoencoder: str | None = None
    """What decodes a shard set of latents, where it is not the one its description names."""
    expected: str | None = None
    """Digest that a shard set must have, because a network was trained on it."""


@dataclass(frozen=True)
class ScoringProtocol:
    """A feature network, metrics, and the reference of those that compare."""

    name: str
    """Of the feature network."""
    features: FeatureNetwork
    metrics: tuple[str, ...]
    reference: Reference | None
    facts: dict[str, str]
    """Everything in it that can move a number, as tags."""
    flags: tuple[str, ...] = ()
    """What has to be said of every number taken by it."""

    def score(self, statistics: ScoreStatistics) -> ScoreResult:
        """The numbers. ScoreError where one is refused."""
        result = scores(statistics, self.reference, self.metrics)
        flags = [*self.flags, *(flag for flag in result.flags if flag not in self.flags)]
        return ScoreResult(result.values, flags, result.spread, result.tags)


def default_features(data: Mapping[str, Any]) -> str:
    """The digits classifier for networks trained on the digits, else Inception."""
    return DIGITS if builtin_source(data) == "digits" else "inception"


def builtin_source(data: Mapping[str, Any]) -> str | None:
    """The built-in set that data facts are of."""
    source = (data.get("recipe") or {}).get("source")
    return source if source in BUILTIN and set(data["recipe"]) == {"source"} else None


def default_metrics(features: FeatureNetwork, labelled: bool) -> tuple[str, ...]:
    """What is measured on these features unless it is said: of Inception `fid` and `is`, else `fd`, with the labels where it can."""
    if "fid" in features.metrics:
        return ("fid", "is")
    return ("fd", "label_agreement") if labelled and "label_agreement" in features.metrics else ("fd",)


def training_data_location(source: str | None, data: Mapping[str, Any], storage: ProjectFolder) -> str | None:
    """Where the data that a network was trained on lie; None where nobody wrote it down."""
    source = source or builtin_source(data)
    if source in BUILTIN:
        return str(ensure_builtin(source, storage.data / source))
    return source if source is None or "://" in source else absolute_source(source)


def open_protocol(
    name: str,
    metrics: Iterable[str],
    labelled: bool,
    shape: tuple[int, int, int],
    size: tuple[int, int],
    real: ReferenceLocation | None,
    storage: ProjectFolder,
    gather: ComputeStatistics,
    decoder: AutoencoderFacts | None = None,
) -> ScoringProtocol:
    """Open the features and have the reference's statistics made where they are missing.

    `labelled` says whether the images have labels, `shape` (C, H, W) is that of samples in the training space, `size` (H, W) that of
    the images, to which larger ones of a folder are cropped, `decoder` what makes images of samples. Raises UserError, ScoreError,
    SourceError or ShardError.
    """
    if name == DIGITS and shape != BUILTIN["digits"].shape:
        raise UserError(
            f"{DIGITS} describes digits of 1 x 8 x 8, these are {' x '.join(map(str, shape))}: take inception."
        )
    features = feature_network(name, shape, storage)
    wanted = select_metrics(tuple(metrics) or default_metrics(features, labelled), features)
    facts = {"evaluator": EVALUATOR, "features": features.id}
    if decoder is not None and features.space == "images":
        facts["autoencoder"] = autoencoder_tag(decoder)
    compared = [metric for metric in wanted if METRICS[metric].compares]
    if not compared:
        return ScoringProtocol(name, features, wanted, None, facts)
    if real is None:
        raise UserError(
            f"{compared[0]} compares with real images, and where those are is not known: name them with --reference."
        )
    seen = size if features.space == "images" else shape[1:]
    found = _resolve_reference(real, name, features, compared, seen, storage.features, gather)
    check_size(real.place, found.reference.resolution, seen)
    return ScoringProtocol(
        name, features, wanted, found.reference, facts | found.tags(real.place), found.flags
    )


@dataclass(frozen=True)
class ResolvedReference:
    """A reference, with what has to be said of it."""

    reference: Reference
    digest: str
    """Of the images, and of what was done to them."""
    flags: tuple[str, ...] = ()
    crop: int | None = None
    """Side of the ADM crop that was made."""

    def tags(self, place: str) -> dict[str, str]:
        """Everything in it that can move a number."""
        count = self.reference.count
        tags = {
            "reference": place,
            "reference_digest": self.digest.rsplit(":", 1)[-1][:16],
            "reference_samples": "unknown" if count is None else str(count),
        }
        return tags if self.crop is None else {**tags, "reference_crop": f"adm{self.crop}"}


def _resolve_reference(
    real: ReferenceLocation,
    name: str,
    features: FeatureNetwork,
    metrics: list[str],
    size: tuple[int, int],
    folder: Path,
    gather: ComputeStatistics,
) -> ResolvedReference:
    """The statistics of the real images, from `folder` or made and kept there. `size` (H, W) is that of what is compared."""
    info = _shard_set(real)
    if info is None and features.space == "training":
        raise UserError(
            f"{name} looks at the training space: its reference is a shard set, not {real.place}."
        )
    if real.place.endswith(".npz"):
        return _adm_reference(real.place, name, features, metrics, size, folder, gather)
    if info is not None:
        if info.kind == "pixels" or features.space == "training":
            check_size(real.place, (info.shape[1], info.shape[2]), size)
        if features.space == "images":
            open_decoder(asdict(info), real.autoencoder, "cpu")
        reference = training_reference(
            name, features, metrics, info, real.place, real.autoencoder, folder, gather
        )
        return ResolvedReference(reference, info.digest, tuple(reference_flags(asdict(info), features)))
    given = stored_images(real.place, size=size)
    flags: tuple[str, ...] = ()
    if given.resolution is not None:
        side = f"{given.resolution} x {given.resolution}"
        flags = (f"The images of the reference {real.place} were scaled and cropped to {side} as ADM does.",)
    reference = images_reference(given, name, features, metrics, folder, gather)
    return ResolvedReference(reference, given.digest, flags, given.resolution)


def _adm_reference(
    place: str,
    name: str,
    features: FeatureNetwork,
    metrics: list[str],
    size: tuple[int, int],
    folder: Path,
    gather: ComputeStatistics,
) -> ResolvedReference:
    """What stands in an .npz file, and what is gathered of the images in it."""
    path = npz_path(place)
    digest = sha256(path)

    def describe(images: NpzImages, wanted: list[str]) -> Reference:
        check_size(place, images.resolution, size)
        given = StoredImages(str(path.absolute()), digest, len(images))
        return Reference.of(gather(StatisticsJob(given, name, features.id, tuple(wanted))), place)

    reference = cached_reference(
        folder, digest, features.id, metrics, lambda: reference_from_adm(path, features, metrics, describe)
    )
    return ResolvedReference(reference, digest)


def _shard_set(real: ReferenceLocation) -> DatasetInfo | None:
    """What a shard set says of itself; None for another place. Raises UserError where it is not the one expected."""
    if not is_shard_set(real.place):
        if real.expected is not None:
            raise UserError(
                f"the data {real.place} that the network was trained on are gone: name others with --reference."
            )
        return None
    info = read_info(real.place)
    if real.expected is not None and info.digest != real.expected:
        raise UserError(
            f"{real.place} holds other data ({info.digest}) than the network was trained on ({real.expected}): name the "
            "reference with --reference."
        )
    return info
