"""What images are scored by: a feature network, the metrics taken on it, and the real images they are compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from soflow_pipelines.autoencoders import AutoencoderFacts
from soflow_pipelines.dataset_info import DatasetInfo
from soflow_pipelines.features import FeatureNetwork
from soflow_pipelines.image_sets import open_image_set
from soflow_pipelines.metrics import METRICS, Reference, ScoreResult, ScoreStatistics, scores
from soflow_pipelines.metrics.score_statistics import RESERVOIR, chosen_metrics
from soflow_pipelines.references import cached_reference, open_reference
from soflow_pipelines.shards import INFO_NAME, ensure_builtin, read_info
from soflow_pipelines.storage import open_storage
from soflow_platform.config.evaluation import DIGITS
from soflow_platform.data import BUILTIN
from soflow_platform.errors import UserError
from soflow_platform.evaluation import feature_network
from soflow_platform.measurement import GivenImages, Measurement
from soflow_platform.real_images import reference_flags, taken, training_reference
from soflow_platform.sampling import autoencoder_tag, open_decoder
from soflow_platform.storage import Storage
from soflow_platform.subjects import file_digest

Gather = Callable[[Measurement], ScoreStatistics]
"""Has the statistics of a set of images made where they are missing."""


@dataclass(frozen=True)
class RealImages:
    """Where the images of a reference are."""

    place: str
    autoencoder: str | None = None
    """What decodes a shard set of latents, where it is not the one its description names."""
    expected: str | None = None
    """Digest that a shard set must have, because a network was trained on it."""


@dataclass(frozen=True)
class Yardstick:
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


def usual_features(data: Mapping[str, Any]) -> str:
    """The digits classifier for networks trained on the digits, else Inception."""
    return DIGITS if builtin_source(data) == "digits" else "inception"


def builtin_source(data: Mapping[str, Any]) -> str | None:
    """The built-in set that data facts are of."""
    source = (data.get("recipe") or {}).get("source")
    return source if source in BUILTIN and set(data["recipe"]) == {"source"} else None


def usual_metrics(features: FeatureNetwork, labelled: bool) -> tuple[str, ...]:
    """What is measured on these features unless it is said: of Inception `fid` and `is`, else `fd`, with the labels where it can."""
    if "fid" in features.metrics:
        return ("fid", "is")
    return ("fd", "label_agreement") if labelled and "label_agreement" in features.metrics else ("fd",)


def data_place(source: str | None, data: Mapping[str, Any], storage: Storage) -> str | None:
    """Where the data that a network was trained on lie; None where nobody wrote it down."""
    source = source or builtin_source(data)
    if source in BUILTIN:
        return str(ensure_builtin(source, storage.data / source))
    return source if source is None or "://" in source else str(Path(source).absolute())


def make_yardstick(
    name: str,
    metrics: Iterable[str],
    labelled: bool,
    shape: tuple[int, int, int],
    resolution: int,
    real: RealImages | None,
    storage: Storage,
    gather: Gather,
    decoder: AutoencoderFacts | None = None,
) -> Yardstick:
    """Open the features and have the reference's statistics made where they are missing.

    `labelled` says whether the images have labels, `shape` (C, H, W) is that of samples in the training space, `resolution` the side
    of the images, to which those of a folder are cropped, `decoder` what makes images of samples. Raises UserError, ScoreError,
    SourceError or ShardError.
    """
    if name == DIGITS and shape != BUILTIN["digits"].shape:
        raise UserError(
            f"{DIGITS} describes digits of 1 x 8 x 8, these are {' x '.join(map(str, shape))}: take inception."
        )
    features = feature_network(name, shape, storage)
    wanted = chosen_metrics(tuple(metrics) or usual_metrics(features, labelled), features)
    facts = {"features": features.id}
    if decoder is not None and features.space == "images":
        facts["autoencoder"] = autoencoder_tag(decoder)
    compared = [metric for metric in wanted if METRICS[metric].compares]
    if not compared:
        return Yardstick(name, features, wanted, None, facts)
    if real is None:
        raise UserError(
            f"{compared[0]} compares with real images, and where those are is not known: name them with --reference."
        )
    reference, about, flags = _reference(real, name, features, compared, resolution, storage, gather)
    return Yardstick(name, features, wanted, reference, facts | about, flags)


def _reference(
    real: RealImages,
    name: str,
    features: FeatureNetwork,
    metrics: list[str],
    resolution: int,
    storage: Storage,
    gather: Gather,
) -> tuple[Reference, dict[str, str], tuple[str, ...]]:
    """The reference, its tags, and what has to be said of it."""
    if real.place.endswith(".npz"):
        reference = open_reference(real.place, features, metrics, storage.features)
        digest = file_digest(Path(real.place).expanduser())
        return reference, _about(real.place, digest, reference), ()
    info = _shard_set(real)
    if info is not None and features.space == "training":
        reference = training_reference(features, metrics, info, real.place, None, storage.features)
        return reference, _about(real.place, info.digest, reference), ()
    if features.space == "training":
        raise UserError(
            f"{name} looks at the training space: its reference is a shard set, not {real.place}."
        )
    given = given_images(real.place, real.autoencoder, None if info is not None else resolution)
    limit = taken(given.count)
    measured = replace(given, count=limit or given.count)

    def make() -> Reference:
        return Reference.of(gather(Measurement(measured, name, features.id, tuple(metrics))), real.place)

    done = {"metrics": sorted(metrics), "limit": limit, "reservoir": RESERVOIR}
    reference = cached_reference(storage.features, given.digest, features.id, done, make)
    return (
        reference,
        _about(real.place, given.digest, reference),
        tuple(reference_flags(given.data, features)),
    )


def given_images(place: str, autoencoder: str | None, resolution: int | None) -> GivenImages:
    """All images of a folder or archive, cropped to `resolution` where it is given, of an .npz file or of a shard set."""
    data = asdict(read_info(place)) if is_shard_set(place) else {}
    images = open_image_set(place, resolution, open_decoder(data, autoencoder, "cpu"))
    where = place if "://" in place else str(Path(place).expanduser().absolute())
    digest = images.digest if data or where.endswith(".npz") else f"{images.digest}-{_last_changed(where)}"
    return GivenImages(where, digest, len(images), resolution, autoencoder, data)


def _last_changed(place: str) -> str:
    """A digest of when each file of a folder, or an archive, was written: its names and sizes say too little of its images."""
    root = Path(place)
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    listed = [(str(path), path.stat().st_mtime_ns) for path in files if path.is_file()]
    return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]


def is_shard_set(place: str) -> bool:
    """Whether a shard set lies there. A remote place is one or nothing, and says itself what is wrong with it."""
    return "://" in place or open_storage(place).size(INFO_NAME) is not None


def _shard_set(real: RealImages) -> DatasetInfo | None:
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


def _about(place: str, digest: str, reference: Reference) -> dict[str, str]:
    count = "unknown" if reference.count is None else str(reference.count)
    return {
        "reference": place,
        "reference_digest": digest.rsplit(":", 1)[-1][:16],
        "reference_samples": count,
    }
