"""Compares the methods of one sweep or of several: distance at each number of function evaluations, cost of training and sampling.

Every trial is scored from its newest checkpoint, because trials have the whole of their budget in common. Costs are measured in one
run on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from soflow_core.failures import InputError
from soflow_core.networks import Architecture
from soflow_core.objectives import Diffusion
from soflow_platform.config.experiment import Experiment
from soflow_platform.config.validation import resolved_experiment
from soflow_platform.errors import JobError, UserError
from soflow_platform.evaluation.protocol import ScoringProtocol
from soflow_platform.jobs.benchmark import SamplingBenchmark, TrainingBenchmark, measure_costs
from soflow_platform.jobs.compare_entries import Cost, Entry, rows_of
from soflow_platform.jobs.compare_rows import Comparison
from soflow_platform.jobs.evaluate import Score, ScoringTask, Services, network_protocol, score_all
from soflow_platform.jobs.log_scores import log_scores
from soflow_platform.jobs.model_under_test import ModelUnderTest, SampleSettings
from soflow_platform.jobs.requests import CompareRequest, ProtocolRequest
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.tuning.record import SweepRecord
from soflow_platform.tuning.recorded import trials_of_record
from soflow_platform.tuning.search_space import Trial

BASELINE = Diffusion(sampler="ddpm", sampling_scale=1.0)
BASELINE_STEPS = 1000
"""Baseline of the speed-up: DDPM with all of its steps."""
SHARED_TAGS = (
    "features",
    "evaluator",
    "reference",
    "reference_digest",
    "reference_samples",
    "reference_crop",
    "autoencoder",
    "labels",
    "seed",
)
"""Settings that all scores of a comparison have in common."""
SCORED_ALIKE = ("features", "reference", "samples", "labels", "seed", "autoencoder", "metrics")
"""Settings of `evaluation` that sweeps must have in common to be compared."""


@dataclass(frozen=True)
class ScoredSweep:
    """Every way of sampling every trial of a sweep, scored."""

    sweep: str
    experiment: Experiment
    entries: list[Entry]
    left_out: list[str]
    device: str | None = None
    """Device that the costs of the entries were measured on; None where they were not."""

    def with_costs(self) -> ScoredSweep:
        """The same with the costs of its entries, measured on this machine. Raises JobError where that fails."""
        try:
            device, entries = _with_costs(self.entries)
        except JobError as error:
            raise JobError(
                f"{error}; the table is kept without them, and --no-costs leaves them out."
            ) from error
        return replace(self, entries=entries, device=device)

    def comparison(self) -> Comparison:
        """The entries as rows."""
        usual = [entry for entry in self.entries if not entry.other_labels]
        score = (usual or self.entries)[0].score
        assert score is not None
        return Comparison(
            self.sweep,
            self.experiment.evaluation.distance,
            rows_of(self.entries),
            {key: value for key, value in score.tags.items() if key in SHARED_TAGS},
            self.device,
            self.left_out,
        )


def score_sweep(request: CompareRequest, services: Services, say: Callable[[str], None]) -> ScoredSweep:
    """Score every trial of the request's sweeps in every way of sampling, and log the scores on the runs of the trials.

    Raises InputError where there is nothing to compare or where sweeps cannot be compared, JobError where something failed.
    """
    experiments = [resolved_experiment(record.experiment, f"sweep {record.id}") for record in request.records]
    _require_alike(request, experiments)
    entries, left_out = _entries(request, experiments, services)
    if not entries:
        plural = "sweeps" if request.others else "sweep"
        raise UserError(f"{plural} {request.name} has nothing to compare: {'; '.join(left_out)}.")
    _require_same_data(entries)
    say(f"scoring {len(entries)} ways of sampling")
    entries, refused = _scored(entries, experiments[0], services)
    for entry in entries:
        assert entry.score is not None
        log_scores(entry.target, [entry.score], services.store)
    return ScoredSweep(request.name, experiments[0], entries, [*left_out, *refused])


def _require_alike(request: CompareRequest, experiments: Sequence[Experiment]) -> None:
    """Raises UserError where sweeps are scored on other features, images or numbers of samples."""
    first = experiments[0]
    for record, experiment in zip(request.others, experiments[1:], strict=True):
        for name in SCORED_ALIKE:
            mine, other = getattr(first.evaluation, name), getattr(experiment.evaluation, name)
            if mine != other:
                raise UserError(
                    f"sweep {request.record.id} has evaluation.{name} {_shown(mine)} and {record.id} has {_shown(other)}: "
                    "their scores cannot stand in one table."
                )


def _require_same_data(entries: Sequence[Entry]) -> None:
    """Raises UserError where trials were trained on other data: their images are then those of other data too."""
    first = entries[0]
    for entry in entries:
        mine, other = first.network.data, entry.network.data
        if mine is not None and other is not None and mine.digest != other.digest:
            raise UserError(
                f"{first.name} was trained on data of digest {mine.digest} and {entry.name} on data of digest {other.digest}: "
                "compare sweeps of the same data."
            )


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, (tuple, list)) else str(value)


def _entries(
    request: CompareRequest, experiments: Sequence[Experiment], services: Services
) -> tuple[list[Entry], list[str]]:
    """Every distinct way of sampling every trial, each training once, and the trials that have no weights, as sentences."""
    entries: list[Entry] = []
    left_out: list[str] = []
    trained: dict[str, str] = {}
    for record, experiment in zip(request.records, experiments, strict=True):
        sweep = record.id if request.others else None
        trials, searched = _compared_trials(record, experiment)
        left_out += searched
        for trial in trials:
            try:
                target = services.resolver.trial(record, trial.name, newest=True)
            except UserError as error:
                left_out.append(str(error).rstrip("."))
                continue
            name = f"{record.id}/{trial.name}"
            digest = trial.experiment.training_digest()
            if sweep is not None and trained.setdefault(digest, name) != name:
                left_out.append(f"{name} is the training of {trained[digest]}, which is in the table")
                continue
            unequal = _unequal(name, experiment, experiments[0])
            entries += _ways(trial, target, request, experiments[0], sweep, unequal)
    return entries, left_out


def _compared_trials(record: SweepRecord, experiment: Experiment) -> tuple[list[Trial], list[str]]:
    """A sweep's trials; where it trained the best points of each method again (`search.final.of_each`), those alone, and a sentence."""
    trials = trials_of_record(record)
    chosen = [trial for trial in trials if trial.phase == "final"]
    final = experiment.search.final
    if not chosen or final is None or final.of_each is None:
        return trials, []
    count = len(trials) - len(chosen)
    sentence = (
        f"the {count} trial(s) of {record.id}'s search, by whose scores settings were chosen; what is compared are the best again, "
        "with fresh seeds"
    )
    return chosen, [sentence]


def _ways(
    trial: Trial,
    target: EvaluationTarget,
    request: CompareRequest,
    experiment: Experiment,
    sweep: str | None,
    unequal: str | None,
) -> list[Entry]:
    """Every distinct way of sampling a trial."""
    assert target.weights is not None
    evaluation = experiment.evaluation
    network = ModelUnderTest.open(target.weights, {})
    entries: list[Entry] = []
    seen = set()
    for way in request.protocol:
        if not way.covers(network.trained.method):
            continue
        sampled = network.sampled(way.settings)
        labels = (way.labels if network.conditional else None) or evaluation.labels
        for steps in way.steps:
            samples = SampleSettings(steps, labels, evaluation.seed, way.samples or evaluation.samples)
            if (sampled.objective, samples) not in seen:
                seen.add((sampled.objective, samples))
                entries.append(Entry(trial, target, sampled, samples, sweep=sweep, unequal=unequal))
    return entries


def _unequal(name: str, experiment: Experiment, first: Experiment) -> str | None:
    """Why a sweep's trials have another budget than those of the first one; None where they have the same."""
    mine = (experiment.training.steps, experiment.training.batch)
    others = (first.training.steps, first.training.batch)
    if mine == others:
        return None
    return (
        f"{name} is of a sweep of {mine[0]:,} steps of {mine[1]} samples, and the first sweep has {others[0]:,} of {others[1]}: their "
        "budgets differ."
    )


def _scored(
    entries: Sequence[Entry], experiment: Experiment, services: Services
) -> tuple[list[Entry], list[str]]:
    """The entries with their scores, and those whose images are refused, because one is not finite, as sentences.

    Raises InputError where all are refused.
    """
    evaluation = experiment.evaluation
    first = entries[0]
    protocol = network_protocol(_protocol_request(experiment), first.target, first.network, services)
    # Slowest first, so that no worker is left alone with a long job at the end.
    order = sorted(range(len(entries)), key=lambda number: -entries[number].work)
    tasks = []
    for number in order:
        entry = entries[number]
        job = entry.network.statistics_job(entry.samples, protocol, evaluation.autoencoder)
        tasks.append(ScoringTask(entry.target.name, job, entry.network.tags(entry.samples)))
    scores: dict[int, Score] = {}
    refused: list[str] = []
    try:
        scores = dict(zip(order, score_all(tasks, protocol, services), strict=True))
    except InputError:
        # One that is refused ends all of them. What is computed is kept: each is asked for by itself.
        for number, task in zip(order, tasks, strict=True):
            score = _score_or_refusal(task, protocol, services)
            if isinstance(score, Score):
                scores[number] = score
            else:
                refused.append(score)
        if not scores:
            raise
    return [replace(entries[number], score=scores[number]) for number in sorted(scores)], refused


def _score_or_refusal(task: ScoringTask, protocol: ScoringProtocol, services: Services) -> Score | str:
    try:
        (score,) = score_all([task], protocol, services)
    except InputError as error:
        return f"{task.name} in {task.tags['steps']} step(s): {str(error).rstrip('.')}"
    return score


def _protocol_request(experiment: Experiment) -> ProtocolRequest:
    """The metrics that the sweep's evaluations reported, with their features and their reference."""
    evaluation = experiment.evaluation
    return ProtocolRequest(
        metrics=tuple(evaluation.metric_kinds(experiment.data.conditional).values()),
        features=evaluation.features,
        reference=evaluation.reference,
        autoencoder=evaluation.autoencoder,
    )


@dataclass(frozen=True)
class TrainingKey:
    """Trainings with equal keys cost the same for each step."""

    network: Architecture
    settings: str
    """The experiment as JSON, but for its length: a step is timed at fractions of the schedule; and for seed and learning rate."""

    @classmethod
    def of(cls, benchmark: TrainingBenchmark) -> TrainingKey:
        settings = benchmark.experiment.resolved()
        settings["training"] = {**settings["training"], "steps": 0}
        settings["optimizer"] = {**settings["optimizer"], "lr": 0}
        settings["seed"] = 0
        return cls(benchmark.network, json.dumps(settings, sort_keys=True))


def _with_costs(entries: Sequence[Entry]) -> tuple[str, list[Entry]]:
    """The device, and the entries with their costs. Equal trainings and equal ways of sampling are measured once."""
    trainings: dict[TrainingKey, TrainingBenchmark] = {}
    for entry in entries:
        benchmark = TrainingBenchmark(entry.network.config, entry.trial.experiment)
        trainings.setdefault(TrainingKey.of(benchmark), benchmark)
    baseline = SamplingBenchmark(entries[0].network.config, BASELINE, BASELINE_STEPS)
    samplings = list(dict.fromkeys([*map(_sampling_benchmark, entries), baseline]))
    costs = measure_costs(list(trainings.values()), samplings)
    step_seconds = dict(zip(trainings, costs.step_seconds, strict=True))
    peak_bytes = dict(zip(trainings, costs.peak_bytes, strict=True))
    image_seconds = dict(zip(samplings, costs.image_seconds, strict=True))

    def cost(entry: Entry) -> Cost:
        key = TrainingKey.of(TrainingBenchmark(entry.network.config, entry.trial.experiment))
        seconds = image_seconds[_sampling_benchmark(entry)]
        return Cost(step_seconds[key], peak_bytes[key], seconds, image_seconds[baseline] / seconds)

    return costs.device, [replace(entry, cost=cost(entry)) for entry in entries]


def _sampling_benchmark(entry: Entry) -> SamplingBenchmark:
    return SamplingBenchmark(entry.network.config, entry.network.objective, entry.samples.steps)
