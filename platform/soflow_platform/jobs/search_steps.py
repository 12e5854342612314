"""Searches the times at which the steps of sampling end, for one trained network: `soflowctl evaluate --search-steps`.

Grids are compared by one metric on the samples of one seed. The best of them was chosen by that noise, so that its score there is too
good: it and the default grid are scored again under other seeds, for labels that are drawn and for every class in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from soflow_core.objectives.step_times import SteppedModel
from soflow_core.samplers.grids import grids_to_try
from soflow_pipelines.metrics import METRICS
from soflow_pipelines.storage.files import write_bytes
from soflow_platform.config.evaluation import POOLED
from soflow_platform.config.validation import resolved_experiment
from soflow_platform.errors import UserError
from soflow_platform.evaluation.image_sources import LabelMode
from soflow_platform.evaluation.protocol import ScoringProtocol
from soflow_platform.jobs.evaluate import (
    DEFAULT_SAMPLES,
    Score,
    ScoringTask,
    Services,
    absolute_protocol,
    label_modes,
    network_protocol,
    score_all,
    settings_digest,
)
from soflow_platform.jobs.model_under_test import ModelUnderTest, SampleSettings
from soflow_platform.jobs.requests import EvaluateRequest, ProtocolRequest, StepSearch
from soflow_platform.jobs.score_summary import ScoreSummary, summaries
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.registry.gate import mean_bound

REPORTED = re.compile(r"eval/(.+)_nfe\d+")
FIRST_MOVE, LAST_MOVE = 1 / 2, 1 / 16
"""Part of the way to its neighbour by which a time is moved: at first, and at the end of the search."""
DECIMALS = 3
"""Of the times that are tried."""
CONFIDENCE = 0.95
"""Probability with which a grid that is no better is not called better."""


@dataclass(frozen=True)
class Grid:
    """Times between 1 and 0 at which steps end, and the sampler settings that give them."""

    times: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    """Empty: those of the network."""

    @property
    def key(self) -> tuple[float, ...]:
        """The times by which grids are told apart."""
        return tuple(round(time, DECIMALS) for time in self.times)

    @property
    def option(self) -> str:
        """What is given to `generate` and `evaluate`: `--grid shifted:2`, `--times 0.42`."""
        if "sampling_grid" in self.settings:
            return f"--grid {self.settings['sampling_grid']}"
        return f"--times {','.join(f'{time:g}' for time in self.times)}"


@dataclass(frozen=True)
class HeldOut:
    """Default and found grid under seeds that the search did not see, for one choice of labels."""

    default: ScoreSummary
    found: ScoreSummary
    gain: float
    """By how much the found grid is better, on average over the seeds."""
    noise: float
    """Student's one-sided bound of the mean gain, by which the two differ by chance."""

    @property
    def is_better(self) -> bool:
        """Whether the found grid is better by more than the noise."""
        return self.gain > self.noise


@dataclass(frozen=True)
class FoundSteps:
    """Result of a search for one number of steps."""

    steps: int
    metric: str
    default: Grid
    found: Grid
    tried: int
    """Number of grids that were scored."""
    at_search: tuple[float, float]
    """Values of the default and of the found grid under the search's own seed."""
    rows: tuple[HeldOut, ...]
    scores: tuple[Score, ...]
    """Of both grids under the other seeds."""
    path: Path
    """File with the `sampling:` section of the found grid."""


def search_steps(
    request: EvaluateRequest, search: StepSearch, services: Services
) -> tuple[EvaluationTarget, list[FoundSteps]]:
    """Find the target, search a grid for each number of steps, and score it against the default one.

    Raises InputError where the request is refused, JobError where the computation failed.
    """
    target = services.resolver.find(request.target)
    if target.weights is None:
        raise UserError(
            f"{target.name} holds images: --search-steps is for a network that makes them, leave it out."
        )
    sampling = request.sampling
    numbers = sampling.numbers(target.usual_steps)
    if min(numbers) < 2:
        raise UserError(
            "--search-steps looks for the times between steps, and one step has none: give --steps 2 or more."
        )
    model = ModelUnderTest.open(target.weights, sampling.settings)
    if not isinstance(model.objective, SteppedModel):
        raise UserError(f"{model.objective.method} has no time grid: there is nothing to search.")
    request = replace(
        request, protocol=absolute_protocol(_with_metric(request.protocol, target, model.conditional))
    )
    if request.num is None and target.sweep is not None:
        request = replace(request, num=int(target.sweep.experiment["evaluation"]["samples"]))
    protocol = network_protocol(request.protocol, target, model, services)
    metric = next(iter(request.protocol.metrics), protocol.metrics[0])
    results = []
    for steps in numbers:
        scorer = GridScorer(request, target.name, model, protocol, metric, steps, services)
        results.append(_search(scorer, search))
    return target, results


def _with_metric(request: ProtocolRequest, target: EvaluationTarget, conditional: bool) -> ProtocolRequest:
    """The request with features and metric of the target's sweep, where the user names neither; its first metric decides."""
    if request.metrics or request.features or target.sweep is None:
        return request
    record = target.sweep
    evaluation = resolved_experiment(record.experiment, f"sweep {record.id}").evaluation
    found = REPORTED.fullmatch(record.metric)
    name = found[1] if found else ""
    kinds = evaluation.metric_kinds(conditional)
    if name not in kinds:
        # The distance on pooled features, which stands beside the sweep's own.
        return replace(request, features=POOLED, metrics=("fd",))
    metrics = dict.fromkeys([kinds[name], *kinds.values()])
    return replace(
        request,
        features=evaluation.features,
        metrics=tuple(metrics),
        reference=request.reference or evaluation.reference,
        autoencoder=request.autoencoder or evaluation.autoencoder,
    )


class GridScorer:
    """Scores grids of one network and one number of steps."""

    def __init__(
        self,
        request: EvaluateRequest,
        name: str,
        model: ModelUnderTest,
        protocol: ScoringProtocol,
        metric: str,
        steps: int,
        services: Services,
    ) -> None:
        self.request, self.name, self.model = request, name, model
        self.protocol, self.metric, self.steps, self.services = protocol, metric, steps, services
        self.sign = 1.0 if METRICS[metric].better == "min" else -1.0

    @property
    def labels(self) -> tuple[LabelMode, ...]:
        """Both choices of labels; one where the network has none."""
        return label_modes("both", self.model.conditional)

    @property
    def default(self) -> Grid:
        """The grid of the network, or of the request."""
        assert isinstance(self.model.objective, SteppedModel)
        return Grid(tuple(self.model.objective.step_times(self.steps)[1:-1]))

    def sampled(self, grid: Grid) -> ModelUnderTest:
        """The network, sampled on this grid."""
        if not grid.settings:
            return self.model
        places = ("sampling_grid", "sampling_times")
        kept = {name: value for name, value in self.model.sampling.items() if name not in places}
        return self.model.sampled({**kept, **grid.settings})

    def named(self, name: str) -> Grid | None:
        """The grid of this name; None where the sampler cannot take its times."""
        grid = Grid((), {"sampling_grid": name})
        try:
            objective = self.sampled(grid).objective
            assert isinstance(objective, SteppedModel)
            times = objective.step_times(self.steps)
        except (UserError, ValueError):
            return None
        return self._possible(replace(grid, times=tuple(times[1:-1])))

    def at(self, times: Sequence[float]) -> Grid | None:
        """The grid of these times; None where they do not fall, or the sampler cannot take them."""
        rounded = tuple(round(time, DECIMALS) for time in times)
        try:
            return self._possible(Grid(rounded, {"sampling_times": list(rounded)}))
        except UserError:
            return None

    def _possible(self, grid: Grid) -> Grid | None:
        try:
            self.sampled(grid).nfe(self.steps)
        except UserError:
            return None
        return grid

    def at_search(self, grids: Sequence[Grid]) -> list[float]:
        """The metric of each grid on the search's own noise, turned so that smaller is better."""
        sampling = self.request.sampling
        labels: LabelMode = "uniform" if sampling.labels == "both" else sampling.labels
        (scores,) = self.scores(grids, [labels], [sampling.seed])
        return [self.sign * score.values[self.metric] for score in scores]

    def scores(
        self, grids: Sequence[Grid], labels: Sequence[LabelMode], seeds: Sequence[int]
    ) -> list[list[Score]]:
        """For each choice of labels, the scores of each grid under each seed, grid after grid."""
        count = self.request.num or DEFAULT_SAMPLES
        tasks = []
        for each in labels:
            for grid in grids:
                model = self.sampled(grid)
                for seed in seeds:
                    samples = SampleSettings(self.steps, each, seed, count)
                    job = model.statistics_job(samples, self.protocol, self.request.protocol.autoencoder)
                    tasks.append(ScoringTask(self.name, job, model.tags(samples)))
        found = score_all(tasks, self.protocol, self.services)
        size = len(grids) * len(seeds)
        return [found[start : start + size] for start in range(0, len(found), size)]


class GridSearch:
    """The grids that were tried, with their values: first those that are given, then moves of single times of the best."""

    def __init__(
        self,
        value: Callable[[Sequence[Grid]], Sequence[float]],
        at: Callable[[Sequence[float]], Grid | None],
        trials: int,
    ) -> None:
        self.value = value
        """Values of grids, smaller is better."""
        self.at = at
        """The grid of some times; None where it cannot be sampled."""
        self.trials = trials
        self.values: dict[tuple[float, ...], float] = {}
        """Times -> value."""
        self.grids: dict[tuple[float, ...], Grid] = {}

    @property
    def best(self) -> Grid:
        """The best grid; of equal ones the first."""
        return self.grids[min(self.values, key=lambda times: self.values[times])]

    def run(self, first: Sequence[Grid | None]) -> None:
        """Try grids until none of the moves helps, or as many as there may be were tried."""
        self._try(first)
        part = FIRST_MOVE
        while part >= LAST_MOVE and len(self.values) < self.trials:
            start = self.best
            self._try([self.at(times) for times in moves(start.times, part)])
            if self.best is start:
                part /= 2

    def _try(self, grids: Sequence[Grid | None]) -> None:
        new: dict[tuple[float, ...], Grid] = {}
        for grid in grids:
            if grid is not None and grid.key not in self.values:
                new.setdefault(grid.key, grid)
        chosen = list(new.values())[: max(0, self.trials - len(self.values))]
        if not chosen:
            return
        for grid, value in zip(chosen, self.value(chosen), strict=True):
            self.values[grid.key], self.grids[grid.key] = value, grid


def moves(times: Sequence[float], part: float) -> list[tuple[float, ...]]:
    """Times of which one is moved by this part of its way to the time before or after it: 2 for each."""
    whole = [1.0, *times, 0.0]
    found = []
    for place in range(1, len(whole) - 1):
        for neighbour in (whole[place - 1], whole[place + 1]):
            moved = whole[place] + part * (neighbour - whole[place])
            found.append((*whole[1:place], moved, *whole[place + 1 : -1]))
    return found


def _search(scorer: GridScorer, search: StepSearch) -> FoundSteps:
    """Search, then score the default grid and the one found under other seeds, and write its settings to a file."""
    default = scorer.default
    tried = GridSearch(scorer.at_search, scorer.at, search.trials)
    tried.run([default, *map(scorer.named, grids_to_try())])
    best = tried.best
    first = scorer.request.sampling.seed + 1
    scores = scorer.scores([default, best], scorer.labels, range(first, first + search.seeds))
    rows = tuple(_held_out(each, scorer) for each in scores)
    flat = tuple(score for each in scores for score in each)
    return FoundSteps(
        steps=scorer.steps,
        metric=scorer.metric,
        default=default,
        found=best,
        tried=len(tried.values),
        at_search=(scorer.sign * tried.values[default.key], scorer.sign * tried.values[best.key]),
        rows=rows,
        scores=flat,
        path=_write(scorer, best, rows[0], flat),
    )


def _held_out(scores: Sequence[Score], scorer: GridScorer) -> HeldOut:
    """`scores` are those of the default grid, then of the found one, seed after seed."""
    half = len(scores) // 2
    pairs = zip(scores[:half], scores[half:], strict=True)
    gains = [scorer.sign * (old.values[scorer.metric] - new.values[scorer.metric]) for old, new in pairs]
    (default,), (found,) = summaries(scores[:half]), summaries(scores[half:])
    return HeldOut(default, found, sum(gains) / len(gains), mean_bound(gains, CONFIDENCE))


def _write(scorer: GridScorer, grid: Grid, row: HeldOut, scores: Sequence[Score]) -> Path:
    """A file with the section `sampling` of a sweep file, and what the grid is worth as a comment."""
    settings = scorer.sampled(grid).sampling
    section = {
        "sampler": settings.get("sampler"),
        "guidance": settings.get("sampling_scale"),
        "interval": None if "sampling_interval" not in settings else list(settings["sampling_interval"]),
        "grid": settings.get("sampling_grid"),
        "times": None if "sampling_times" not in settings else list(settings["sampling_times"]),
        "steps": scorer.steps,
    }
    lines = [
        f"# {scorer.metric} {row.found.cell(scorer.metric)}, on the default grid {row.default.cell(scorer.metric)}: "
        f"{row.found.tags['samples']} samples, labels {row.found.tags['labels']}, seeds {', '.join(row.found.seeds)}.",
        "sampling:",
        *(f"  {name}: {value}" for name, value in section.items() if value is not None),
    ]
    digest = settings_digest({str(number): score.digest for number, score in enumerate(scores)})
    path = scorer.services.project.root / "evaluations" / "search-steps" / f"{digest}.yaml"
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path
