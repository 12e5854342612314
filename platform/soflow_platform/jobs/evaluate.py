"""`soflowctl evaluate`: scores of a model, a run, a checkpoint, a folder of images or an .npz file.

Statistics are computed in blocks on all machines of a cluster and kept, so that an interrupted command goes on; a score that was
computed before with the same settings is read from the project folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from soflow_pipelines.features.registry import FEATURES
from soflow_pipelines.references.latent_decoder import open_decoder
from soflow_pipelines.references.reference_store import ReferenceLocation
from soflow_pipelines.references.statistics_job import StatisticsJob
from soflow_pipelines.references.stored_images import StoredImages, holds_latents, stored_images
from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.config.evaluation import POOLED
from soflow_platform.config.locations import absolute_autoencoder, absolute_features
from soflow_platform.errors import UserError
from soflow_platform.evaluation.image_sources import LabelMode
from soflow_platform.evaluation.protocol import (
    ImageSpec,
    ProtocolSettings,
    ScoringProtocol,
    default_features,
    open_protocol,
    training_data_location,
)
from soflow_platform.evaluation.runner import StatisticsRunner
from soflow_platform.jobs.model_under_test import ModelUnderTest, SampleSettings
from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest, SamplingRequest
from soflow_platform.jobs.targets import EvaluationTarget, TargetResolver
from soflow_platform.storage.code_digest import CODE_TAG, running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

DEFAULT_SAMPLES = 50_000
"""Samples of a network that are scored."""


@dataclass(frozen=True)
class Services:
    """Project folder, tracking store and statistics runner of the scoring commands."""

    project: ProjectFolder
    store: TrackingStore
    runner: StatisticsRunner

    @property
    def resolver(self) -> TargetResolver:
        return TargetResolver.for_scoring(self.project, self.store)


@dataclass(frozen=True)
class Score:
    """The metrics of one set of images, with every setting that decides them."""

    name: str
    """Name of the target."""
    values: dict[str, float]
    spread: dict[str, float]
    """Standard deviation of `is` over its splits and of `kid` over its subsets."""
    flags: list[str]
    """Reasons, as sentences, why a value cannot be compared with others of the same metric."""
    tags: dict[str, str]
    """Every setting that decides the values."""

    @property
    def digest(self) -> str:
        """Digest of the settings."""
        return settings_digest(self.tags)


@dataclass(frozen=True)
class ScoringTask:
    """One set of images to be scored."""

    name: str
    """Name of the target."""
    job: StatisticsJob
    tags: dict[str, str]
    """Every setting that decides the images."""


def settings_digest(tags: dict[str, str]) -> str:
    """Twelve hexadecimal digits that are equal for equal settings."""
    return hashlib.sha256(json.dumps(tags, sort_keys=True).encode()).hexdigest()[:12]


def evaluate(request: EvaluateRequest, services: Services) -> tuple[EvaluationTarget, list[Score]]:
    """Find the target and score it: one Score for each number of sampling steps.

    Raises InputError where the request is refused, JobError where the computation failed.
    """
    target = services.resolver.find(request.target)
    return target, score_target(target, request, services)


def score_target(target: EvaluationTarget, request: EvaluateRequest, services: Services) -> list[Score]:
    """As `evaluate`, of a target that was found; the request's own name of it is not looked at."""
    request = replace(request, protocol=absolute_protocol(request.protocol))
    score = _score_network if target.weights is not None else _score_images
    return score(request, target, services)


def absolute_protocol(request: ProtocolRequest) -> ProtocolRequest:
    """The same with absolute paths: actors run in working folders of their own."""
    return replace(
        request,
        features=request.features and absolute_features(request.features),
        autoencoder=absolute_autoencoder(request.autoencoder),
    )


def _score_network(request: EvaluateRequest, target: EvaluationTarget, services: Services) -> list[Score]:
    assert target.weights is not None
    sampling = request.sampling
    model = ModelUnderTest.open(target.weights, sampling.settings)
    scales = [{**sampling.settings, "sampling_scale": scale} for scale in sampling.guidance]
    models = [model.sampled(settings) for settings in scales] or [model]
    count = request.num or DEFAULT_SAMPLES
    samples = [
        SampleSettings(steps, labels, seed, count)
        for labels in label_modes(sampling.labels, model.conditional)
        for steps in sampling.numbers(target.usual_steps)
        for seed in sampling.seed_numbers
    ]
    ways = [(way, each) for way in models for each in samples]
    # Settings that the sampler refuses are found before a reference is computed.
    tags = [way.tags(each) for way, each in ways]
    protocol = network_protocol(request.protocol, target, model, services)
    jobs = [way.statistics_job(each, protocol, request.protocol.autoencoder) for way, each in ways]
    tasks = [ScoringTask(target.name, job, own) for job, own in zip(jobs, tags, strict=True)]
    return score_all(tasks, protocol, services)


def label_modes(labels: LabelMode | Literal["both"], conditional: bool) -> tuple[LabelMode, ...]:
    """How labels are chosen, one after the other; without labels there is one way."""
    if labels != "both":
        return (labels,)
    return ("uniform", "balanced") if conditional else ("uniform",)


def network_protocol(
    request: ProtocolRequest, target: EvaluationTarget, model: ModelUnderTest, services: Services
) -> ScoringProtocol:
    """The scoring protocol for a network: by default its training data are the reference.

    An autoencoder is opened only for features of images.
    """
    features = request.features or default_features(model.data)
    in_training_space = features in FEATURES and FEATURES[features].space == "training"
    decoder = None if in_training_space else open_decoder(model.data, request.autoencoder, "cpu")
    reference = _named_reference(request, services.project)
    if reference is None and (place := training_data_location(target.data, model.data, services.project)):
        reference = ReferenceLocation(
            place, request.autoencoder, expected=model.data.digest if model.data else None
        )
    factor = decoder.facts.factor if decoder else 1
    size = model.shape[1] * factor, model.shape[2] * factor
    images = ImageSpec(model.shape, size, model.conditional, decoder.facts if decoder else None)
    settings = ProtocolSettings(features, request.metrics, images, reference, request.diversity)
    return open_protocol(settings, services.project, services.runner.one)


def _named_reference(request: ProtocolRequest, project: ProjectFolder) -> ReferenceLocation | None:
    place = training_data_location(request.reference, None, project)
    return None if place is None else ReferenceLocation(place, request.autoencoder)


def _score_images(request: EvaluateRequest, target: EvaluationTarget, services: Services) -> list[Score]:
    assert target.images is not None
    reference = _named_reference(request.protocol, services.project)
    _refuse_unused(request, target.name, [target.images, *([reference.place] if reference else [])])
    images = stored_images(target.images, request.protocol.autoencoder)
    count = request.num or images.count
    if count > images.count:
        raise UserError(f"{target.name} holds {images.count} images, {count} were asked for with --num.")
    protocol = _images_protocol(request.protocol, images, reference, services)
    if count < images.count:
        part = f"{count} of the {images.count} images of {target.name} are scored, chosen by a fixed permutation of their numbers."
        protocol = replace(protocol, flags=(*protocol.flags, part))
    job = StatisticsJob(replace(images, count=count), protocol.name, protocol.features.id, protocol.metrics)
    tags = {"images": images.digest.rsplit(":", 1)[-1], "samples": str(count)}
    return score_all([ScoringTask(target.name, job, tags)], protocol, services)


def _images_protocol(
    request: ProtocolRequest,
    images: StoredImages,
    reference: ReferenceLocation | None,
    services: Services,
) -> ScoringProtocol:
    """The scoring protocol for images of the size of the first one."""
    decoder = open_decoder(images.info, request.autoencoder, "cpu")
    first, _ = images.open("cpu").read(0, 1)
    channels, height, width = first.shape[1:]
    spec = ImageSpec((channels, height, width), (height, width), False, decoder.facts if decoder else None)
    settings = ProtocolSettings(request.features or "inception", request.metrics, spec, reference)
    return open_protocol(settings, services.project, services.runner.one)


def _refuse_unused(request: EvaluateRequest, name: str, places: Sequence[str]) -> None:
    """Raises UserError for a setting that has no effect on images that exist already."""
    if request.protocol.features == POOLED:
        raise UserError(
            f"{name} holds images and {POOLED} looks at the training space of a network: name other features, such as inception."
        )
    default, sampling = SamplingRequest(), request.sampling
    set_by_user = {
        "--steps": sampling.steps is not None,
        "--labels": sampling.labels != default.labels,
        "--seed": sampling.seed != default.seed,
        "--seeds": sampling.seeds != default.seeds,
        "--sampler": "sampler" in sampling.settings,
        "--guidance": "sampling_scale" in sampling.settings or bool(sampling.guidance),
        "--interval": "sampling_interval" in sampling.settings,
        "--times": "sampling_times" in sampling.settings,
        "--grid": "sampling_grid" in sampling.settings,
        "--plot": request.plotted,
    }
    for option, is_set in set_by_user.items():
        if is_set:
            raise UserError(f"{name} holds images: {option} is for a network that makes them, leave it out.")
    if request.protocol.autoencoder is not None and not any(holds_latents(place) for place in places):
        raise UserError(
            f"{name} holds images: --autoencoder is for latents, and there are none, leave it out."
        )


@dataclass(frozen=True)
class ScoreStore:
    """Scores of one protocol in the project folder, found again by their settings and by the code that computed them."""

    folder: Path
    metrics: tuple[str, ...]

    def read(self, name: str, tags: dict[str, str]) -> Score | None:
        """The score of these settings, under the name given; None where there is none."""
        try:
            content = read_json(self._path(tags))
            if content is None:
                return None
            return Score(name, content["values"], content["spread"], content["flags"], content["tags"])
        except (ValueError, KeyError, TypeError):
            # A damaged file is written again with the score.
            return None

    def add(self, score: Score) -> None:
        content = {
            "values": score.values,
            "spread": score.spread,
            "flags": score.flags,
            "tags": score.tags,
        }
        write_json(self._path(score.tags), content)

    def _path(self, tags: dict[str, str]) -> Path:
        key = settings_digest({**tags, "metrics": ",".join(self.metrics), CODE_TAG: running_code().digest})
        return self.folder / f"{key}.json"


def score_all(tasks: Sequence[ScoringTask], protocol: ScoringProtocol, services: Services) -> list[Score]:
    """A Score for each task. Statistics are computed for the tasks alone that have no stored score."""
    store = ScoreStore(services.project.root / "evaluations" / "results", protocol.metrics)
    tags = [{**task.tags, **protocol.facts} for task in tasks]
    scores = [store.read(task.name, own) for task, own in zip(tasks, tags, strict=True)]
    missing = [number for number, score in enumerate(scores) if score is None]
    statistics = services.runner.statistics([tasks[number].job for number in missing])
    for number, computed in zip(missing, statistics, strict=True):
        result = protocol.score(computed)
        score = Score(tasks[number].name, result.values, result.spread, result.flags, tags[number])
        store.add(score)
        scores[number] = score
    return [score for score in scores if score is not None]
