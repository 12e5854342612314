"""`soflowctl promote`: scores a candidate and the champion under one protocol, and makes the better one champion.

Both are scored with the same seeds, labels, numbers of samples and of function evaluations, features and reference; the seeds are not
those of the evaluations that the candidate was chosen by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from soflow_core.weights import WeightsError, require_finite_file
from soflow_platform.errors import UserError
from soflow_platform.jobs.evaluate import Services
from soflow_platform.jobs.gate_scores import (
    Contender,
    GateScorer,
    gate_protocol,
    not_scorable,
    selection_flags,
    training_flags,
    with_autoencoder,
)
from soflow_platform.jobs.requests import PromoteRequest
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.registry.gate import Comparison, refusals
from soflow_platform.registry.promotion import Champions, Decision, Promotion, compare_stored_scores
from soflow_platform.registry.tags import RECIPE_TAG, TRIALS_TAG
from soflow_platform.registry.version_list import whole_number
from soflow_platform.registry.versions import CHAMPION, aliased, find_version, register
from soflow_platform.tracking.outages import describe_outage
from soflow_platform.tracking.store import SWEEP_TAG, Tracking
from soflow_platform.tuning.lookup import resolve
from soflow_platform.tuning.record import BestTrial, ScoredStep, SweepRecord, load_record


@dataclass(frozen=True)
class Outcome:
    """What `promote` decided and did."""

    model: str
    candidate: str
    """Label of the candidate."""
    decision: Decision
    comparisons: tuple[Comparison, ...] = ()
    flags: tuple[str, ...] = ()
    promotion: Promotion | None = None
    """The change of champion; None where there was none."""


def promote(request: PromoteRequest, services: Services) -> Outcome:
    """Decide about a candidate, and make it champion where it passes and this is no dry run.

    Raises InputError where the request is refused, JobError where a version cannot be scored or another command was faster.
    """
    name, number, contender = _candidate(request, services)
    _require_finite(contender)
    champions = Champions(services.store, services.project, name)
    present = champions.present()
    if number is not None and present == number:
        raise UserError(f"version {number} of {name!r} is the champion already.")
    outcome = _decide(request, services, name, contender, present)
    if request.dry_run or number is None:
        return outcome
    if outcome.decision.kind == "refused":
        champions.record(number, outcome.decision)
        return outcome
    return replace(outcome, promotion=champions.move(number, outcome.decision))


def _decide(
    request: PromoteRequest, services: Services, name: str, candidate: Contender, present: str | None
) -> Outcome:
    if request.force is not None:
        decision = Decision("forced", f"forced: {request.force}", present)
        return Outcome(name, candidate.label, decision)
    champion_version = aliased(services.store, name, CHAMPION)
    if request.reuse_scores:
        if candidate.target.version is None:
            raise UserError(f"{candidate.label} has no stored scores of a version: leave out --reuse-scores.")
        version = find_version(services.store, f"{name}/{candidate.target.version[1]}")
        reason = compare_stored_scores(version, champion_version)
        return Outcome(name, candidate.label, Decision("promoted", reason, present))
    champion = None if present is None else _registered(services, name, present, "champion version")
    return _scored(request, services, name, candidate, champion)


def _scored(
    request: PromoteRequest, services: Services, name: str, candidate: Contender, champion: Contender | None
) -> Outcome:
    """Score both and let the gate decide."""
    present = None if champion is None or champion.target.version is None else champion.target.version[1]
    protocol = gate_protocol(request, candidate, champion)
    if champion is None and not any(guard.limit is not None for guard in protocol.guards or ()):
        flagged = training_flags([candidate], protocol, [])
        first = Decision("promoted", "first champion", None, {"flags": flagged} if flagged else {})
        return Outcome(name, candidate.label, first, flags=tuple(flagged))
    scorer = GateScorer(with_autoencoder(request, candidate), protocol, services)
    scored = scorer.scores(candidate, champion)
    flags = [
        *scored.flags,
        *selection_flags(candidate, protocol, scored.comparisons),
        *training_flags([candidate, champion], protocol, scored.comparisons),
    ]
    numbers = {
        "nfe": protocol.nfe,
        "samples": protocol.samples,
        "seeds": list(protocol.seeds),
        "labels": protocol.labels,
        "confidence": protocol.gate.confidence,
        "settings": scored.settings,
        "scores": [each.as_json() for each in scored.comparisons],
        "flags": flags,
    }
    refused = refusals(scored.comparisons)
    if refused:
        decision = Decision("refused", "; ".join(refused), present, numbers)
    else:
        decision = Decision("promoted", _passed(scored.comparisons), present, numbers)
    return Outcome(name, candidate.label, decision, scored.comparisons, tuple(flags))


def _passed(comparisons: Sequence[Comparison]) -> str:
    first = comparisons[0]
    if first.champion is None:
        return "first champion; it reaches the limits of its guards"
    return (
        f"{first.name} {first.value:.6g} is better than {first.champion_value:.6g} by {first.gain:.3g}, more than the noise "
        f"{first.noise:.3g}"
    )


def _candidate(request: PromoteRequest, services: Services) -> tuple[str, str | None, Contender]:
    """Name of the model, number of the version and the candidate; a trial is registered first, unless this is a dry run."""
    name = request.model
    if _is_trial(name, services):
        return _trial(name, services, request.dry_run)
    version = find_version(services.store, name)
    number = str(version.version)
    return version.name, number, _registered(services, version.name, number, "version")


def _is_trial(name: str, services: Services) -> bool:
    """Whether a name is SWEEP/TRIAL and no MODEL/VERSION."""
    sweep, slash, trial = name.partition("/")
    return bool(slash) and ":" not in sweep and not trial.isdigit() and bool(services.project.sweeps.is_dir())


def _trial(name: str, services: Services, dry_run: bool) -> tuple[str, str | None, Contender]:
    found = resolve(services.project, name)
    record, trial = found.record, found.trial
    assert trial is not None, "SWEEP/TRIAL names a trial"
    model = str((record.experiment.get("registry") or {}).get("model") or record.name)
    if dry_run:
        target = services.resolver.trial(record, trial)
        return model, None, Contender(name, target, record.recipe(trial), len(record.trials))
    number = _register_trial(record, trial, model, services)
    return model, number, _registered(services, model, number, "version")


def _register_trial(record: SweepRecord, trial: str, model: str, services: Services) -> str:
    """Register the best checkpoint of a trial. Returns the version. Raises UserError where it has none that was scored."""
    best = record.checkpoints(services.project, trial).best(record.metric, record.mode)
    if best is None:
        raise UserError(f"trial {trial} of sweep {record.id} has no checkpoint that was scored.")
    checkpoint, evaluation = best
    scored = ScoredStep.of(evaluation)
    samples = services.project.trial(record.id, trial) / "samples"
    grids = [str(path) for path in sorted(samples.glob(f"*-step-{scored.step:08d}.png"))]
    chosen = replace(record, best=BestTrial(trial, scored.step, scored.metrics, grids))
    if record.experiment_id is None:
        raise UserError(
            f"sweep {record.id} has no MLflow experiment yet: `soflowctl run` it to its end first."
        )
    tracking = Tracking(services.store, record.experiment_id)
    return register(tracking, chosen.candidate(model), checkpoint)


def _require_finite(candidate: Contender) -> None:
    """Raises UserError for weights that make no images, which not every way to promote finds out by scoring them."""
    assert candidate.target.weights is not None
    try:
        require_finite_file(candidate.target.weights)
    except WeightsError as error:
        raise UserError(f"{candidate.label} cannot become champion: {error}.") from None


def _registered(services: Services, name: str, number: str, what: str) -> Contender:
    """A registered version with its weights fetched. Raises JobError for a champion whose weights are gone."""
    label = f"{what} {number} of {name!r}"
    version = find_version(services.store, f"{name}/{number}")
    try:
        target = services.resolver.find(f"models:/{name}/{number}")
    except Exception as error:
        if describe_outage(error) is not None:
            raise
        unscored = Contender(label, EvaluationTarget(label), {})
        raise not_scorable(unscored, error) from error
    recipe = _recipe(version.tags, services)
    return Contender(label, target, recipe, whole_number(version.tags.get(TRIALS_TAG)) or 1)


def _recipe(tags: Mapping[str, str], services: Services) -> dict[str, Any]:
    """The settings of a version's trial, from the version or from the sweep's record; empty where neither has them."""
    kept = json.loads(tags.get(RECIPE_TAG) or "{}")
    if kept:
        return dict(kept)
    record = load_record(services.project, tags.get(SWEEP_TAG, "")) if tags.get(SWEEP_TAG) else None
    return {} if record is None else dict(record.experiment)
