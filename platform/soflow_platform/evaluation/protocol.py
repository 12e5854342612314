"""Scoring protocol: feature network, metrics and reference statistics that together define a score."""

from __future__ import annotations

from dataclasses import dataclass

from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.images.codec import AutoencoderFacts
from soflow_pipelines.metrics import EVALUATOR, METRICS, Reference, ScoreResult, ScoreStatistics, scores
from soflow_pipelines.metrics.registry import select_metrics
from soflow_pipelines.metrics.scores import check_size
from soflow_pipelines.preparation.builtin import BUILTIN, ensure_builtin
from soflow_pipelines.references.reference_store import ReferenceLocation, ReferenceStore
from soflow_pipelines.references.statistics_job import ComputeStatistics
from soflow_pipelines.shards.info import DatasetInfo
from soflow_pipelines.sources.opening import absolute_source
from soflow_platform.config.evaluation import DIGITS
from soflow_platform.errors import UserError
from soflow_platform.evaluation.feature_networks import feature_network
from soflow_platform.generation.decoding import autoencoder_tag
from soflow_platform.storage.project import ProjectFolder

DIVERSITY = ("precision", "recall")
"""Metrics that tell the quality of images from their variety."""


@dataclass(frozen=True)
class ImageSpec:
    """The images that are scored."""

    latent_shape: tuple[int, int, int]
    """(C, H, W) of samples in the training space; of stored images, their own."""
    image_size: tuple[int, int]
    """(H, W) of the images; larger ones of a reference folder are cropped to it."""
    labelled: bool
    """Whether the images were generated for labels."""
    decoder: AutoencoderFacts | None = None
    """The autoencoder that decodes latents to images."""


@dataclass(frozen=True)
class ProtocolSettings:
    """Settings from which `open_protocol` makes a protocol."""

    features: str
    """Name of the feature network."""
    metrics: tuple[str, ...]
    """Names of the metrics; empty: the default metrics of the features."""
    images: ImageSpec
    reference: ReferenceLocation | None
    """Real images to compare with; None where there are none."""
    diversity: bool = False
    """Whether precision and recall stand beside the default metrics, where the features give them."""


@dataclass(frozen=True)
class ScoringProtocol:
    """A feature network, metrics, and the reference of the metrics that need one."""

    name: str
    """Name of the feature network."""
    features: FeatureNetwork
    metrics: tuple[str, ...]
    reference: Reference | None
    facts: dict[str, str]
    """Every setting of the protocol that can change a score, as tags."""
    flags: tuple[str, ...] = ()
    """Flags of every score taken by this protocol."""

    def score(self, statistics: ScoreStatistics) -> ScoreResult:
        """The scores of a set of images. Raises ScoreError where one is refused."""
        result = scores(statistics, self.reference, self.metrics)
        flags = [*self.flags, *(flag for flag in result.flags if flag not in self.flags)]
        return ScoreResult(result.values, flags, result.spread, result.tags)


def default_features(info: DatasetInfo | None) -> str:
    """The default feature network: the digits classifier for networks trained on the digits, else Inception."""
    return DIGITS if builtin_source(info) == "digits" else "inception"


def builtin_source(info: DatasetInfo | None) -> str | None:
    """Name of the built-in data set that `info` describes; None for other data."""
    recipe = {} if info is None else dict(info.recipe or {})
    source = recipe.get("source")
    return source if isinstance(source, str) and source in BUILTIN and set(recipe) == {"source"} else None


def default_metrics(features: FeatureNetwork, labelled: bool) -> tuple[str, ...]:
    """The default metrics: `fid` and `is` on Inception, else `fd`, with label agreement where the features can give it."""
    if "fid" in features.metrics:
        return ("fid", "is")
    return ("fd", "label_agreement") if labelled and "label_agreement" in features.metrics else ("fd",)


def training_data_location(
    source: str | None, info: DatasetInfo | None, storage: ProjectFolder
) -> str | None:
    """Location of the data that a network was trained on, from its source or its description; None where neither names one."""
    source = source or builtin_source(info)
    if source is not None and source in BUILTIN:
        return str(ensure_builtin(source, storage.data / source))
    return source if source is None or "://" in source else absolute_source(source)


def open_protocol(
    settings: ProtocolSettings, storage: ProjectFolder, compute: ComputeStatistics
) -> ScoringProtocol:
    """Open the feature network, and have the reference statistics computed where they are missing.

    Raises InputError where a setting is refused, or the reference is of other data, features or size.
    """
    name, images, location = settings.features, settings.images, settings.reference
    if name == DIGITS and images.latent_shape != BUILTIN["digits"].shape:
        raise UserError(
            f"{DIGITS} describes digits of 1 x 8 x 8, these are {' x '.join(map(str, images.latent_shape))}: take inception."
        )
    features = feature_network(name, images.latent_shape, storage)
    default = default_metrics(features, images.labelled)
    if settings.diversity:
        default += tuple(name for name in DIVERSITY if METRICS[name].any_features or name in features.metrics)
    metrics = select_metrics(settings.metrics or default, features)
    facts = {"evaluator": EVALUATOR, "features": features.id}
    if images.decoder is not None and features.space == "images":
        facts["autoencoder"] = autoencoder_tag(images.decoder)
    compared = tuple(metric for metric in metrics if METRICS[metric].compares)
    if not compared:
        return ScoringProtocol(name, features, metrics, None, facts)
    if location is None:
        raise UserError(
            f"{compared[0]} compares with real images, and where those are is not known: name them with --reference."
        )
    size = images.image_size if features.space == "images" else images.latent_shape[1:]
    store = ReferenceStore(features, name, compared, storage.features, compute)
    resolved = store.resolve(location, size)
    check_size(location.place, resolved.reference.resolution, size)
    return ScoringProtocol(
        name, features, metrics, resolved.reference, facts | resolved.tags(location.place), resolved.flags
    )
