"""The scores that the gate before the champion compares: candidate and champion, under one protocol and the same seeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from soflow_core.failures import InputError, summarize
from soflow_core.nfe import steps_for
from soflow_pipelines.metrics.registry import METRICS
from soflow_platform.config.evaluation import POOLED, EvaluationConfig
from soflow_platform.config.gate import GateConfig, GuardConfig
from soflow_platform.config.locations import absolute_autoencoder
from soflow_platform.errors import JobError, UserError
from soflow_platform.evaluation.image_sources import LabelMode
from soflow_platform.evaluation.protocol import ScoringProtocol
from soflow_platform.jobs.evaluate import ScoringTask, Services, network_protocol, score_all
from soflow_platform.jobs.model_under_test import ModelUnderTest, SampleSettings
from soflow_platform.jobs.requests import PromoteRequest, ProtocolRequest
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.registry.gate import Comparison

USUAL_GUARDS = (
    GuardConfig(metric="precision", tolerance=0.1),
    GuardConfig(metric="recall", tolerance=0.1),
    GuardConfig(metric="label_agreement", tolerance=0.02),
)
"""Guards where `registry.gate.guards` is not set, as far as the gate's features give them."""


@dataclass(frozen=True)
class Contender:
    """A version, or a trial that is not registered, with what it was trained and chosen by."""

    label: str
    """As sentences name it."""
    target: EvaluationTarget
    recipe: dict[str, Any]
    """Settings of its trial."""
    trials: int = 1
    """Trials among which it was chosen."""

    @property
    def evaluation(self) -> EvaluationConfig:
        return EvaluationConfig(**self.recipe["evaluation"])

    @property
    def gate(self) -> GateConfig:
        return GateConfig(**(self.recipe.get("registry") or {}).get("gate", {}))


@dataclass(frozen=True)
class GateProtocol:
    """How contenders are scored by the gate: the same for both."""

    gate: GateConfig
    metric: str
    features: str
    """Name of the feature network of the deciding metric."""
    nfe: int
    samples: int
    labels: LabelMode
    guards: tuple[GuardConfig, ...] | None
    """None: the usual ones."""

    @property
    def seeds(self) -> range:
        return range(self.gate.first_seed, self.gate.first_seed + self.gate.seeds)


def gate_protocol(request: PromoteRequest, candidate: Contender, champion: Contender | None) -> GateProtocol:
    """The protocol of the candidate's recipe. Raises UserError where that cannot be read, or for fewer samples than the sweeps took."""
    try:
        gate, evaluation = candidate.gate, candidate.evaluation
        least = max(each.evaluation.samples for each in (candidate, champion) if each is not None)
        chosen, own, nfe = _chosen_by(candidate)
        metric = gate.metric or chosen
        if metric is None:
            raise KeyError(candidate.recipe["search"]["metric"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the recipe of {candidate.label} or of the champion cannot be read ({summarize(error)[:200]}): it was registered by an "
            'earlier version, and its sweep is not here; pass --reuse-scores, or --force "REASON".'
        ) from None
    samples = request.samples or max(gate.samples or 0, least)
    if samples < least:
        raise UserError(
            f"--samples {samples} is less than the {least} samples of the sweep: the gate takes at least as many."
        )
    features = gate.features or (own if gate.metric is None else evaluation.features)
    return GateProtocol(gate, metric, features, nfe, samples, evaluation.labels, gate.guards)


def _chosen_by(candidate: Contender) -> tuple[str | None, str, int]:
    """What `search.metric` is: a metric, None for an unknown one, on a feature network, at a number of function evaluations."""
    evaluation = candidate.evaluation
    name, nfe = str(candidate.recipe["search"]["metric"]).removeprefix("eval/").rsplit("_nfe", 1)
    kinds = evaluation.metric_kinds(bool(candidate.recipe["data"].get("conditional", True)))
    if evaluation.also_pooled and name == "fd":
        # The distance on pooled features, which stands beside the sweep's own.
        return "fd", POOLED, int(nfe)
    return kinds.get(name), evaluation.features, int(nfe)


def with_autoencoder(request: PromoteRequest, candidate: Contender) -> PromoteRequest:
    """The request with the autoencoder by which the candidate's sweep was scored, where it names none and that folder is still there.

    Without it the one that made the latents is looked for by its id, which a sweep names a folder for where that finds none.
    """
    own = candidate.evaluation.autoencoder
    if request.autoencoder is not None or own is None or (os.path.isabs(own) and not os.path.exists(own)):
        return request
    return replace(request, autoencoder=own)


def selection_flags(
    candidate: Contender, protocol: GateProtocol, comparisons: Sequence[Comparison]
) -> list[str]:
    """A flag where the candidate was chosen by the features that now decide, and no guard looks at others."""
    same = _chosen_by(candidate)[1] == protocol.features
    others = {each.features for each in comparisons} - {comparisons[0].features}
    if not same or others:
        return []
    trials = f"among {candidate.trials} trials " if candidate.trials > 1 else ""
    return [
        f"{candidate.label} was chosen {trials}by the features that decide here ({protocol.features}): a network can be tuned to a "
        "metric while its images get worse; add a guard on other features to registry.gate.guards."
    ]


def training_flags(
    contenders: Sequence[Contender | None], protocol: GateProtocol, comparisons: Sequence[Comparison]
) -> list[str]:
    """A flag for each contender that was trained on features by which the gate compares."""
    by_metric = {
        protocol.features: "decide here",
        **{
            guard.features: "guard here"
            for guard in protocol.guards or ()
            if guard.features not in (None, protocol.features)
        },
    }
    flags = []
    for contender in contenders:
        recipe = {} if contender is None else contender.recipe
        alignment = (recipe.get("training") or {}).get("alignment") or {}
        role = by_metric.get(str(alignment.get("features"))) if alignment.get("weight") else None
        if contender is not None and role is not None:
            alone = len({each.features for each in comparisons}) <= 1
            remedy = "; add a guard on other features to registry.gate.guards" if alone else ""
            flags.append(
                f"{contender.label} was trained on the features that {role} ({alignment['features']}, training.alignment): its "
                f"distance on them says less than that of a network that never saw them{remedy}."
            )
    return flags


@dataclass(frozen=True)
class GateScores:
    """The comparisons of a gate, the deciding one first, with flags and settings."""

    comparisons: tuple[Comparison, ...]
    flags: list[str]
    settings: dict[str, dict[str, str]]
    """Feature network -> everything of its protocol that can move a number."""


@dataclass(frozen=True)
class GateScorer:
    """Scores contenders under the protocol of a gate."""

    request: PromoteRequest
    protocol: GateProtocol
    services: Services

    def scores(self, candidate: Contender, champion: Contender | None) -> GateScores:
        """Score both on every feature network that the gate names."""
        gate = self.protocol
        model = _opened(candidate)
        rival = None if champion is None else _opened_champion(champion)
        if champion is not None and rival is not None:
            _require_comparable(candidate, model, champion, rival)
        comparisons: list[Comparison] = []
        flags: list[str] = []
        settings: dict[str, dict[str, str]] = {}
        for features in dict.fromkeys(
            [gate.features, *(g.features or gate.features for g in gate.guards or ())]
        ):
            protocol, guards = self._opened_protocol(features, candidate, model)
            ours, own_flags = self._values(candidate, model, protocol)
            theirs: dict[str, tuple[float, ...]] | None = None
            if champion is not None and rival is not None:
                theirs, rival_flags = self._champion_values(champion, rival, protocol)
                own_flags += rival_flags
            flags += own_flags
            settings[features] = protocol.facts
            deciding = [None] if features == gate.features else []
            for guard in [*deciding, *guards]:
                metric = gate.metric if guard is None else guard.metric
                comparisons.append(
                    Comparison(
                        metric=metric,
                        features=protocol.features.id,
                        better=METRICS[metric].better,
                        candidate=ours[metric],
                        champion=None if theirs is None else theirs[metric],
                        confidence=gate.gate.confidence,
                        guard=guard,
                    )
                )
        if rival is not None and _data_digest(rival) != _data_digest(model):
            flags.append(
                "The champion was trained on other data; both are compared with the candidate's reference."
            )
        return GateScores(tuple(comparisons), list(dict.fromkeys(flags)), settings)

    def _opened_protocol(
        self, features: str, candidate: Contender, model: ModelUnderTest
    ) -> tuple[ScoringProtocol, list[GuardConfig]]:
        """The scoring protocol on one feature network, with the guards that look at it."""
        gate = self.protocol
        if gate.guards is None:
            guards = self._usual_guards(features, candidate, model)
        else:
            guards = [guard for guard in gate.guards if (guard.features or gate.features) == features]
        deciding = [gate.metric] if features == gate.features else []
        metrics = tuple(dict.fromkeys([*deciding, *(guard.metric for guard in guards)]))
        return self._protocol(features, metrics, candidate, model), guards

    def _usual_guards(self, features: str, candidate: Contender, model: ModelUnderTest) -> list[GuardConfig]:
        able = self._protocol(features, (self.protocol.metric,), candidate, model).features.metrics
        return [
            guard
            for guard in USUAL_GUARDS
            if guard.metric in able and guard.metric != self.protocol.metric
            if guard.metric != "label_agreement" or model.conditional
        ]

    def _protocol(
        self, features: str, metrics: tuple[str, ...], candidate: Contender, model: ModelUnderTest
    ) -> ScoringProtocol:
        settings = ProtocolRequest(
            metrics=metrics,
            features=features,
            reference=self.request.reference or self.protocol.gate.reference,
            autoencoder=absolute_autoencoder(self.request.autoencoder),
        )
        return network_protocol(settings, candidate.target, model, self.services)

    def _champion_values(
        self, champion: Contender, model: ModelUnderTest, protocol: ScoringProtocol
    ) -> tuple[dict[str, tuple[float, ...]], list[str]]:
        try:
            return self._values(champion, model, protocol)
        except InputError as error:
            raise not_scorable(champion, error) from error

    def _values(
        self, contender: Contender, model: ModelUnderTest, protocol: ScoringProtocol
    ) -> tuple[dict[str, tuple[float, ...]], list[str]]:
        """The value of each metric for each seed, and the flags."""
        gate = self.protocol
        try:
            steps = steps_for(model.objective, gate.nfe, model.conditional)
        except ValueError as error:
            raise UserError(f"{contender.label}: {error}.") from None
        samples = [SampleSettings(steps, gate.labels, seed, gate.samples) for seed in gate.seeds]
        autoencoder = absolute_autoencoder(self.request.autoencoder)
        tasks = [
            ScoringTask(contender.label, model.statistics_job(each, protocol, autoencoder), model.tags(each))
            for each in samples
        ]
        scores = score_all(tasks, protocol, self.services)
        values = {metric: tuple(score.values[metric] for score in scores) for metric in protocol.metrics}
        return values, [flag for score in scores for flag in score.flags]


def _require_comparable(
    candidate: Contender, model: ModelUnderTest, champion: Contender, rival: ModelUnderTest
) -> None:
    """Raises UserError where one protocol cannot score both networks."""
    differing = {
        "classes": (model.config.classes, rival.config.classes),
        "samples": (model.shape, rival.shape),
        "autoencoders": (_autoencoder(model), _autoencoder(rival)),
    }
    for what, (ours, theirs) in differing.items():
        if ours != theirs:
            raise UserError(
                f"{candidate.label} and {champion.label} have different {what} ({ours} and {theirs}): no protocol scores both; "
                'pass --force "REASON", or register it under another name.'
            )


def _autoencoder(model: ModelUnderTest) -> str | None:
    return None if model.data is None else model.data.autoencoder_digest


def _data_digest(model: ModelUnderTest) -> str | None:
    return None if model.data is None else model.data.digest


def _opened_champion(champion: Contender) -> ModelUnderTest:
    try:
        return _opened(champion)
    except (InputError, OSError) as error:
        raise not_scorable(champion, error) from error


def _opened(contender: Contender) -> ModelUnderTest:
    assert contender.target.weights is not None
    return ModelUnderTest.open(contender.target.weights, {})


def not_scorable(champion: Contender, error: BaseException) -> JobError:
    return JobError(
        f"{champion.label} cannot be scored, so that nothing can be compared with it: {summarize(error).rstrip('.')}; mend that, or "
        'pass --force "REASON".'
    )
