"""The methods of a sweep side by side: distance at each number of evaluations, and what training and sampling cost.

Every trial is scored from its newest checkpoint, for the whole of its budget is what trials have in common. Costs are measured in one
run on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from soflow_core.objectives import Diffusion
from soflow_platform.config.comparison import SamplingConfig
from soflow_platform.config.document import Document
from soflow_platform.config.experiment import Experiment
from soflow_platform.errors import JobError, UserError
from soflow_platform.evaluation.runner import INPUT_ERRORS, RayStatisticsRunner, Report
from soflow_platform.jobs.benchmark import Costs, SamplingBenchmark, TrainingBenchmark, measure_costs
from soflow_platform.jobs.evaluate import EvaluateRequest, Score, network_protocol, scored
from soflow_platform.jobs.log_scores import log_scores
from soflow_platform.jobs.model_under_test import ModelUnderTest
from soflow_platform.jobs.targets import EvaluationTarget, TargetResolver
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TrackingStore
from soflow_platform.tuning.record import SweepRecord
from soflow_platform.tuning.search_space import Trial, trials

BASELINE = Diffusion(sampler="ddpm", sampling_scale=1.0)
BASELINE_STEPS = 1000
"""What images are compared with in speed: DDPM with all of its steps."""
SHARED = (
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
"""Settings that all numbers of a comparison have in common."""


@dataclass(frozen=True)
class Row:
    """One trial, sampled in one way."""

    budget: str
    """What it has in common with the others of its table: `steps` or `evaluations`."""
    trial: str
    method: str
    uses_jvp: bool
    trained_steps: int
    sampling: str
    """How, where it is not the method's only way: `ddim`, `euler, guidance 3`."""
    steps: int
    nfe: int
    samples: int
    distance: float
    label_agreement: float | None
    step_seconds: float | None = None
    peak_bytes: float | None = None
    image_seconds: float | None = None
    speedup: float | None = None
    """Over DDPM of 1000 steps, in time for one image."""
    trained_guidance: float | None = None
    """Scale of the guidance in its training, 1 where it is none; None where the method has none."""
    flags: tuple[str, ...] = ()

    def named(self, rows: Sequence[Row]) -> str:
        """The method; where other rows are of the same method trained otherwise, its guidance too, or its trial."""
        alike = [row for row in rows if row.method == self.method]
        if len({row.trial for row in alike}) == 1:
            return self.method
        if len({row.trial for row in alike if row.trained_guidance == self.trained_guidance}) > 1:
            return self.trial
        unguided = self.trained_guidance in (None, 1)
        return f"{self.method}, {'no guidance' if unguided else f'guidance {self.trained_guidance:g}'}"


@dataclass(frozen=True)
class Comparison:
    """All rows, with what they have in common."""

    sweep: str
    distance: str
    """Its name: `fid`, `fd`, ..."""
    rows: list[Row]
    settings: dict[str, str]
    """Of every number: features, reference, labels, seed."""
    device: str | None
    """What the costs were measured on; None where they were not."""
    left_out: list[str] = field(default_factory=list)
    """Trials that could not be compared, and why."""

    def conclusions(self) -> list[str]:
        """What the rows say of one evaluation, for each budget, in sentences."""
        return [s for budget in self.budgets for s in _conclusions(budget, self.distance, self.of(budget))]

    @property
    def budgets(self) -> list[str]:
        """In the order of the sweep."""
        return list(dict.fromkeys(row.budget for row in self.rows))

    def of(self, budget: str) -> list[Row]:
        """The rows of one budget."""
        return [row for row in self.rows if row.budget == budget]

    def as_record(self) -> dict[str, Any]:
        """For other programs."""
        return {**asdict(self), "conclusions": self.conclusions()}


@dataclass(frozen=True)
class Entry:
    """A trained network and one way to sample it."""

    trial: Trial
    subject: EvaluationTarget
    network: ModelUnderTest
    steps: int
    samples: int


def compare(
    record: SweepRecord,
    protocol: Sequence[SamplingConfig],
    storage: ProjectFolder,
    store: TrackingStore,
    address: str | None,
    report: Report,
    costs: bool,
    say: Callable[[str], None],
    keep: Callable[[Comparison], None],
) -> Comparison:
    """Score every trial of a sweep in every way of the protocol, and measure what the methods cost.

    `keep` gets the comparison before the costs are measured, and again with them. Raises UserError where there is nothing to compare,
    JobError where something failed.
    """
    experiment = Experiment(**record.experiment)
    resolver = TargetResolver.for_scoring(storage, store)
    entries, left_out = _entries(record, experiment, protocol, resolver)
    if not entries:
        raise UserError(f"sweep {record.id} has nothing to compare: {'; '.join(left_out)}.")
    say(f"scoring {len(entries)} ways of sampling")
    scores = _scores(entries, experiment, storage, address, report)
    for entry, score in zip(entries, scores, strict=True):
        log_scores(entry.subject, [score], store)
    settings = {key: value for key, value in scores[0].tags.items() if key in SHARED}

    def found(measured: MeasuredCosts | None) -> Comparison:
        rows = [
            _row(budget, entry, score, measured, number)
            for budget in experiment.search.budgets
            for number, (entry, score) in enumerate(zip(entries, scores, strict=True))
            if budget in entry.trial.budgets
        ]
        device = measured.costs.device if measured else None
        return Comparison(record.id, experiment.evaluation.distance, rows, settings, device, left_out)

    comparison = found(None)
    keep(comparison)
    if costs:
        say("measuring seconds and memory, one thread")
        try:
            comparison = found(_costs(entries))
        except JobError as error:
            raise JobError(
                f"{error}; the table is kept without them, and --no-costs leaves them out."
            ) from error
        keep(comparison)
    return comparison


def _entries(
    record: SweepRecord, experiment: Experiment, protocol: Sequence[SamplingConfig], resolver: TargetResolver
) -> tuple[list[Entry], list[str]]:
    """Every way of sampling every trial on so many images once, and the trials that have no weights."""
    entries: list[Entry] = []
    left_out = []
    for trial in trials(Document(record.experiment), experiment):
        try:
            subject = resolver.trial(record, trial.name, newest=True)
        except UserError as error:
            left_out.append(str(error).rstrip("."))
            continue
        assert subject.weights is not None
        network = ModelUnderTest.open(subject.weights, {})
        seen = set()
        for row in protocol:
            if not row.covers(network.trained.method):
                continue
            sampled = network.sampled(row.settings)
            samples = row.samples or experiment.evaluation.samples
            for steps in row.steps:
                if (sampled.objective, steps, samples) not in seen:
                    seen.add((sampled.objective, steps, samples))
                    entries.append(Entry(trial, subject, sampled, steps, samples))
    return entries, left_out


def _scores(
    entries: Sequence[Entry],
    experiment: Experiment,
    storage: ProjectFolder,
    address: str | None,
    report: Report,
) -> list[Score]:
    """In the order of the entries; those that take longest are made first, so that no worker is left with one at the end."""
    evaluation = experiment.evaluation
    kind = "fid" if evaluation.distance == "fid" else "fd"
    agrees = any("label_agreement" in name for name in evaluation.metrics(experiment.data.conditional))
    request = EvaluateRequest(
        subject="",
        metrics=(kind, "label_agreement") if agrees else (kind,),
        labels=evaluation.labels,
        seed=evaluation.seed,
        features=evaluation.features,
        autoencoder=evaluation.autoencoder,
    )
    order = sorted(
        range(len(entries)), key=lambda i: -entries[i].network.nfe(entries[i].steps) * entries[i].samples
    )
    slowest_first = [entries[i] for i in order]
    try:
        with RayStatisticsRunner(storage, address, report) as gathering:
            first = slowest_first[0]
            yardstick = network_protocol(request, first.subject, first.network, storage, gathering)
            settings = (evaluation.labels, evaluation.seed)
            found = scored(
                [e.subject.name for e in slowest_first],
                yardstick,
                [
                    e.network.measurement(yardstick, e.steps, *settings, e.samples, evaluation.autoencoder)
                    for e in slowest_first
                ],
                [e.network.facts(e.steps, *settings, e.samples) for e in slowest_first],
                storage,
                gathering,
            )
    except UserError:
        raise
    except INPUT_ERRORS as error:
        raise UserError(str(error)) from error
    scores: dict[int, Score] = dict(zip(order, found, strict=True))
    return [scores[i] for i in range(len(entries))]


@dataclass(frozen=True)
class MeasuredCosts:
    """Costs, and which of them are those of each entry."""

    costs: Costs
    trained: list[int]
    sampled: list[int]
    baseline: float
    """Seconds of an image of DDPM with 1000 steps."""


def _costs(entries: Sequence[Entry]) -> MeasuredCosts:
    """Each method is measured once, however many trials and budgets it has."""
    trained: dict[str, TrainingBenchmark] = {}
    sampled: dict[str, SamplingBenchmark] = {}
    of_training, of_sampling = [], []
    for entry in entries:
        network, experiment = entry.network.config, entry.trial.experiment
        # Its length does not matter: a step is timed at places of the schedule.
        training = experiment.training.model_copy(update={"steps": 0})
        key = repr((network, experiment.model_copy(update={"training": training})))
        of_training.append(list(trained).index(key) if key in trained else len(trained))
        trained.setdefault(key, TrainingBenchmark(network, experiment))
        image = SamplingBenchmark(network, entry.network.objective, entry.steps)
        of_sampling.append(list(sampled).index(repr(image)) if repr(image) in sampled else len(sampled))
        sampled.setdefault(repr(image), image)
    baseline = SamplingBenchmark(entries[0].network.config, BASELINE, BASELINE_STEPS)
    costs = measure_costs(list(trained.values()), [*sampled.values(), baseline])
    return MeasuredCosts(costs, of_training, of_sampling, costs.image_seconds[-1])


def _row(budget: str, entry: Entry, score: Score, measured: MeasuredCosts | None, number: int) -> Row:
    planned = entry.trial.experiment.training.steps
    done = entry.subject.step or 0
    flags = list(score.flags)
    if done < planned:
        flags.append(f"{entry.trial.name} is at step {done} of {planned}: it has not had its budget.")
    usual = entry.trial.experiment.evaluation.samples
    if entry.samples != usual:
        way = f"{entry.network.objective.method} ({_sampling(score.tags)})"
        flags.append(
            f"{way} is scored on {entry.samples} samples, where {usual} are usual: fewer give a larger distance."
        )
    kinds = [name for name in score.values if name != "label_agreement"]
    row = Row(
        budget=budget,
        trial=entry.trial.name,
        method=entry.network.objective.method,
        uses_jvp=entry.network.objective.uses_jvp,
        trained_steps=done,
        trained_guidance=entry.network.objective.trained_guidance,
        sampling=_sampling(score.tags),
        steps=entry.steps,
        nfe=int(score.tags["nfe"]),
        samples=entry.samples,
        distance=score.values[kinds[0]],
        label_agreement=score.values.get("label_agreement"),
        flags=tuple(flags),
    )
    if measured is None:
        return row
    image = measured.costs.image_seconds[measured.sampled[number]]
    return replace(
        row,
        step_seconds=measured.costs.step_seconds[measured.trained[number]],
        peak_bytes=measured.costs.peak_bytes[measured.trained[number]],
        image_seconds=image,
        speedup=measured.baseline / image,
    )


def _sampling(tags: dict[str, str]) -> str:
    scale = float(tags.get("sampling_scale", "1"))
    said = [tags["sampler"]] if "sampler" in tags else []
    return ", ".join(said + ([f"guidance {scale:g}"] if scale != 1 else []))


def _conclusions(budget: str, distance: str, rows: Sequence[Row]) -> list[str]:
    """What is best at one evaluation, among networks that are guided alike in training, and at any number."""
    once = sorted((row for row in rows if row.nfe == 1), key=lambda row: row.distance)
    scales = sorted({row.trained_guidance or 1 for row in once})
    sentences = []
    for scale in scales:
        alike = [row for row in once if (row.trained_guidance or 1) == scale]
        guided = (
            "" if len(scales) == 1 else ", no guidance" if scale == 1 else f", guidance {scale:g} in training"
        )
        sentences += _at_one_evaluation(f"equal {budget}, 1 NFE{guided}", distance, alike)
    overall = min(rows, key=lambda row: row.distance)
    if overall.nfe > 1:
        sampling = f" ({overall.sampling})" if overall.sampling else ""
        sentences.append(
            f"equal {budget}, any NFE: the best is {overall.named(rows)}{sampling} at {overall.nfe} NFE, {distance} "
            f"{overall.distance:.4g}."
        )
    return sentences


def _at_one_evaluation(which: str, distance: str, once: Sequence[Row]) -> list[str]:
    """The best of all, the best without a Jacobian-vector product, and how SoFlow stands; `once` is in order of distance."""
    best = once[0]
    jvp = "with a Jacobian-vector product" if best.uses_jvp else "without a Jacobian-vector product"
    sentences = [f"{which}: the best is {best.method}, {jvp}, {distance} {best.distance:.4g}."]
    free = [row for row in once if not row.uses_jvp]
    if best.uses_jvp and free:
        sentences.append(
            f"{which}: the best without a Jacobian-vector product is {free[0].method}, {distance} {free[0].distance:.4g}."
        )
    soflow = next((row for row in once if row.method == "soflow"), None)
    if soflow is not None:
        place = once.index(soflow) + 1
        holds = "holds" if place == 1 else f"does not hold: it is {place} of {len(once)}"
        sentences.append(
            f"{which}: that SoFlow has the best distance {holds} ({distance} {soflow.distance:.4g})."
        )
    return sentences
