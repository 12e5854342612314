"""`soflowctl evaluate`: scores of a model, a run, a checkpoint, a folder of images or an .npz file.

Images are made and described block by block on all machines of a cluster and kept, so that a command that was cut goes on; a number
that is there is not taken again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from soflow_pipelines.metrics import ScoreStatistics
from soflow_pipelines.storage.files import read_json, write_json
from soflow_platform.config.evaluation import POOLED
from soflow_platform.config.locations import absolute_autoencoder, absolute_features
from soflow_platform.errors import UserError
from soflow_platform.evaluation.image_sources import LabelMode
from soflow_platform.evaluation.protocol import (
    ReferenceLocation,
    ScoringProtocol,
    default_features,
    open_protocol,
    training_data_location,
)
from soflow_platform.evaluation.reference_store import holds_latents, stored_images
from soflow_platform.evaluation.runner import INPUT_ERRORS, RayStatisticsRunner, Report, silent
from soflow_platform.evaluation.statistics import StatisticsJob
from soflow_platform.generation.decoding import open_decoder
from soflow_platform.jobs.model_under_test import ModelUnderTest
from soflow_platform.jobs.targets import EvaluationTarget, find_target
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore

USUAL_NUMBER = 50_000


@dataclass(frozen=True)
class EvaluateRequest:
    """What `soflowctl evaluate` was asked for."""

    subject: str
    metrics: tuple[str, ...] = ()
    """None: the usual ones of the features."""
    num: int | None = None
    """Images; None: 50,000 of a network, all of a folder or a file."""
    steps: tuple[int, ...] = (1,)
    labels: LabelMode = "uniform"
    seed: int = 0
    features: str | None = None
    """None: inception; of networks trained on the digits, the digits classifier."""
    reference: str | None = None
    """None: the data the network was trained on."""
    autoencoder: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The numbers of one set of images, with all that moves them."""

    subject: str
    values: dict[str, float]
    spread: dict[str, float]
    """Standard deviation of `is` over its splits and of `kid` over its subsets."""
    flags: list[str]
    """Sentences: why a number is not comparable with others of its name."""
    tags: dict[str, str]
    """Every setting that can move the numbers."""

    @property
    def digest(self) -> str:
        """Of those settings."""
        return settings_digest(self.tags)


def settings_digest(tags: dict[str, str]) -> str:
    """The same for the same settings."""
    return hashlib.sha256(json.dumps(tags, sort_keys=True).encode()).hexdigest()[:12]


def evaluate(
    request: EvaluateRequest,
    storage: ProjectFolder,
    store: TrackingStore,
    address: str | None = None,
    report: Report = silent,
) -> tuple[EvaluationTarget, list[Score]]:
    """Score what was asked for: one Score for each number of steps.

    Raises UserError for what is refused, JobError for what failed.
    """
    subject = find_target(request.subject, storage, store)
    # Actors have working folders of their own.
    request = replace(
        request,
        features=request.features and absolute_features(request.features),
        autoencoder=absolute_autoencoder(request.autoencoder),
    )
    try:
        with RayStatisticsRunner(storage, address, report) as gathering:
            score = _score_network if subject.weights is not None else _score_images
            return subject, score(request, subject, storage, gathering)
    except UserError:
        raise
    except INPUT_ERRORS as error:
        raise UserError(str(error)) from error


def _score_network(
    request: EvaluateRequest,
    subject: EvaluationTarget,
    storage: ProjectFolder,
    gathering: RayStatisticsRunner,
) -> list[Score]:
    assert subject.weights is not None
    network = ModelUnderTest.open(subject.weights, request.sampling)
    count = request.num or USUAL_NUMBER
    facts = [network.facts(steps, request.labels, request.seed, count) for steps in request.steps]
    yardstick = network_protocol(request, subject, network, storage, gathering)
    measurements = [
        network.measurement(yardstick, steps, request.labels, request.seed, count, request.autoencoder)
        for steps in request.steps
    ]
    subjects = [subject.name] * len(measurements)
    return scored(subjects, yardstick, measurements, facts, storage, gathering)


def network_protocol(
    request: EvaluateRequest,
    subject: EvaluationTarget,
    network: ModelUnderTest,
    storage: ProjectFolder,
    gathering: RayStatisticsRunner,
) -> ScoringProtocol:
    """What this network's images are scored by."""
    decoder = open_decoder(network.data, request.autoencoder, "cpu")
    real = _named_reference(request, storage)
    if real is None and (place := training_data_location(subject.data, network.data, storage)):
        real = ReferenceLocation(place, request.autoencoder, expected=network.data.get("digest"))
    factor = decoder.facts.factor if decoder else 1
    return open_protocol(
        request.features or default_features(network.data),
        request.metrics,
        network.conditional,
        network.shape,
        (network.shape[1] * factor, network.shape[2] * factor),
        real,
        storage,
        gathering.one,
        decoder.facts if decoder else None,
    )


def _named_reference(request: EvaluateRequest, storage: ProjectFolder) -> ReferenceLocation | None:
    place = training_data_location(request.reference, {}, storage)
    return None if place is None else ReferenceLocation(place, request.autoencoder)


def _score_images(
    request: EvaluateRequest,
    subject: EvaluationTarget,
    storage: ProjectFolder,
    gathering: RayStatisticsRunner,
) -> list[Score]:
    assert subject.images is not None
    real = _named_reference(request, storage)
    _refuse_unused(request, subject.name, [subject.images, *([real.place] if real else [])])
    given = stored_images(subject.images, request.autoencoder)
    count = request.num or given.count
    if count > given.count:
        raise UserError(f"{subject.name} holds {given.count} images, {count} were asked for with --num.")
    decoder = open_decoder(given.data, request.autoencoder, "cpu")
    first, _ = given.open("cpu").read(0, 1)
    channels, height, width = first.shape[1:]
    yardstick = open_protocol(
        request.features or "inception",
        request.metrics,
        False,
        (channels, height, width),
        (height, width),
        real,
        storage,
        gathering.one,
        decoder.facts if decoder else None,
    )
    if count < given.count:
        part = f"{count} of the {given.count} images of {subject.name} are scored, chosen by a fixed permutation of their numbers."
        yardstick = replace(yardstick, flags=(*yardstick.flags, part))
    images = replace(given, count=count)
    measurement = StatisticsJob(images, yardstick.name, yardstick.features.id, yardstick.metrics)
    facts = {"images": given.digest.rsplit(":", 1)[-1], "samples": str(count)}
    return scored([subject.name], yardstick, [measurement], [facts], storage, gathering)


def _refuse_unused(request: EvaluateRequest, name: str, places: Sequence[str]) -> None:
    """Raises UserError for a setting that would change nothing, for the images are there already."""
    if request.features == POOLED:
        raise UserError(
            f"{name} holds images and {POOLED} looks at the training space of a network: name other features, such as inception."
        )
    usual = EvaluateRequest(request.subject)
    of_networks = {
        "--steps": request.steps != usual.steps,
        "--labels": request.labels != usual.labels,
        "--seed": request.seed != usual.seed,
        "--sampler": "sampler" in request.sampling,
        "--guidance": "sampling_scale" in request.sampling,
    }
    for option, given in of_networks.items():
        if given:
            raise UserError(f"{name} holds images: {option} is for a network that makes them, leave it out.")
    if request.autoencoder is not None and not any(holds_latents(place) for place in places):
        raise UserError(
            f"{name} holds images: --autoencoder is for latents, and there are none, leave it out."
        )


def scored(
    subjects: Sequence[str],
    yardstick: ScoringProtocol,
    measurements: Sequence[StatisticsJob],
    facts: Sequence[dict[str, str]],
    storage: ProjectFolder,
    gathering: RayStatisticsRunner,
) -> list[Score]:
    """A Score for each measurement, whose images the `facts` decide; those that were taken before are read."""
    tags = [{**own, **yardstick.facts} for own in facts]
    known = [_kept(storage, name, own, yardstick) for name, own in zip(subjects, tags, strict=True)]
    missing = [m for m, score in zip(measurements, known, strict=True) if score is None]
    made = iter(gathering.statistics(missing))
    return [
        score or _take(name, yardstick, next(made), own, storage)
        for name, own, score in zip(subjects, tags, known, strict=True)
    ]


def _take(
    subject: str,
    yardstick: ScoringProtocol,
    statistics: ScoreStatistics,
    tags: dict[str, str],
    storage: ProjectFolder,
) -> Score:
    result = yardstick.score(statistics)
    score = Score(subject, result.values, result.spread, result.flags, tags)
    write_json(_result_path(storage, tags, yardstick), asdict(score))
    return score


def _kept(
    storage: ProjectFolder, subject: str, tags: dict[str, str], yardstick: ScoringProtocol
) -> Score | None:
    content = read_json(_result_path(storage, tags, yardstick))
    return None if content is None else Score(**{**content, "subject": subject})


def _result_path(storage: ProjectFolder, tags: dict[str, str], yardstick: ScoringProtocol) -> Any:
    key = settings_digest({**tags, "metrics": ",".join(yardstick.metrics)})
    return storage.root / "evaluations" / "results" / f"{key}.json"
