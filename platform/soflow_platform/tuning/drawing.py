"""Trials that results lead to: those that a search algorithm draws while the sweep runs, and the best ones again in the end.

Each is stored in the record of the sweep before it starts, so that a sweep that goes on has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from soflow_platform.config.search import TRAINING_SECONDS
from soflow_platform.errors import JobError, UserError
from soflow_platform.storage.checkpoints import CheckpointState
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_status import read_status
from soflow_platform.tuning.context import SweepContext, scored_trials, trial_outcome
from soflow_platform.tuning.display import TrialOutcome
from soflow_platform.tuning.points import SearchSpace
from soflow_platform.tuning.ranking import RankedPoint, ranked_points, sort_key
from soflow_platform.tuning.record import ScoredStep, TrialEntry
from soflow_platform.tuning.search_space import Phase, Trial, added_trial
from soflow_platform.tuning.tpe import Proposer, Tried, TriedState

ATTEMPTS = 200
"""Proposals for one trial before a space in which hardly any point can be trained is given up."""


def add_trials(context: SweepContext, points: Sequence[dict[str, Any]], phase: Phase) -> list[Trial]:
    """New trials of the sweep, stored in its record. Raises UserError where settings are no valid experiment."""
    following = max((trial.index for trial in context.trials), default=-1) + 1
    added = [
        added_trial(context.document, context.experiment, index, settings, phase)
        for index, settings in enumerate(points, start=following)
    ]
    context.trials.extend(added)
    context.record.trials.extend(map(TrialEntry.of, added))
    context.patiently(lambda: context.record.save(context.project), "storing a trial")
    return added


class DrawnTrials:
    """Draws the trials of a sweep whose algorithm learns from results, and remembers how those so far ended."""

    def __init__(
        self,
        context: SweepContext,
        finished: Mapping[str, CheckpointState],
        check: Callable[[Trial], None],
    ) -> None:
        """`check` raises UserError for a trial that cannot be trained on the data."""
        self.context, self._check = context, check
        experiment = context.experiment
        self._space = SearchSpace(experiment.search, experiment.resolved())
        self._modes = experiment.objective_modes
        self._proposer = Proposer(self._space, tuple(self._modes.values()), experiment.seed)
        self._scores: dict[str, list[ScoredStep]] = {}
        self._tried: dict[str, Tried] = {}
        for trial in context.trials:
            self._tried[trial.name] = Tried(trial.settings, TriedState.RUNNING)
        for name, state in finished.items():
            for evaluation in state.evaluations:
                self.report(name, evaluation)
            self.end(name)
        for name in context.failed:
            self.end(name)

    @property
    def left(self) -> int:
        """Trials that are still to be drawn; none once the sweep was asked to stop.

        Trials that stop make room for others, which would all be drawn from the few results so far.
        """
        if stop_requested(self.context.project, self.context.record.id):
            return 0
        return draws_left(self.context)

    def draw(self) -> Trial:
        """The next trial. Raises JobError where no point that can be trained is found."""
        number = len(self.context.trials)
        reason = "constraints leave nothing"
        for attempt in range(ATTEMPTS):
            point = self._proposer.propose(list(self._tried.values()), number, attempt)
            if not self._space.allows(point):
                continue
            try:
                self._check(
                    added_trial(self.context.document, self.context.experiment, number, point, "drawn")
                )
            except UserError as error:
                reason = str(error).rstrip(".")
                continue
            (trial,) = add_trials(self.context, [point], "drawn")
            self._tried[trial.name] = Tried(trial.settings, TriedState.RUNNING)
            return trial
        raise JobError(
            f"search.space has hardly a point that can be trained ({ATTEMPTS} were tried): {reason}; widen it or search.constraints."
        )

    def report(self, name: str, evaluation: Mapping[str, Any]) -> None:
        """Take an evaluation of a trial; one that goes on, or fills its scheduler's rungs again, reports earlier ones once more."""
        scores, scored = self._scores.setdefault(name, []), ScoredStep.of(evaluation)
        if not scores or scored.step > scores[-1].step:
            scores.append(scored)

    def end(self, name: str) -> None:
        """Take that a trial has ended."""
        trial = next(trial for trial in self.context.trials if trial.name == name)
        scores = self._scores.get(name, [])
        status = read_status(self.context.project.trial(self.context.record.id, name))
        metric, mode = self.context.experiment.search.metric, self.context.experiment.mode
        if not scores or (status is not None and status.failure):
            self._tried[name] = Tried(trial.settings, TriedState.FAILED)
            return
        best = min(scores, key=lambda scored: sort_key(scored.metrics[metric], mode))
        seconds = None
        if status is not None and status.images and status.images_per_second:
            seconds = status.images / status.images_per_second
        named = {**best.metrics, TRAINING_SECONDS: seconds}
        values = tuple(value for each in self._modes if (value := named.get(each)) is not None)
        last = scores[-1].step
        state = TriedState.FINISHED if last == trial.experiment.training.steps else TriedState.PRUNED
        self._tried[name] = Tried(trial.settings, state, values, last)


def draws_left(context: SweepContext) -> int:
    """How many trials the sweep's algorithm has still to draw; 0 for one whose file lists them."""
    drawn = sum(trial.phase == "drawn" for trial in context.trials)
    return max(0, context.experiment.search.drawn - drawn)


def is_complete(context: SweepContext) -> bool:
    """Whether the sweep gets no more trials."""
    if draws_left(context) > 0:
        return False
    if context.experiment.search.final is None:
        return True
    # The best are chosen again where trials came to the sweep since.
    return bool(context.trials) and context.trials[-1].phase == "final"


def ranked_for_final(context: SweepContext, outcomes: Sequence[TrialOutcome]) -> list[RankedPoint]:
    """The points of the search, best first: by `search.metric`, and those of a method in `search.final.metrics` by its own metric.

    Points of methods with different metrics are compared with each other by nothing: `of_each` takes each method's own best.
    """
    experiment = context.experiment
    own = experiment.search.final.metrics if experiment.search.final else {}
    reported = experiment.evaluation.reported(experiment.data.conditional)
    methods = {trial.name: trial.experiment.objective.method for trial in context.trials}
    scored = []
    for trial in scored_trials(context.trials, outcomes, experiment.search.metric):
        metric = own.get(methods[trial.name])
        if metric is not None and trial.value is not None:
            best = context.record.checkpoints(context.project, trial.name).best(metric, reported[metric])
            # Ranked in the mode of `search.metric`.
            sign = 1 if reported[metric] == experiment.mode else -1
            trial = replace(trial, value=None if best is None else sign * best[1][metric])
        scored.append(trial)
    return ranked_points(scored, experiment.mode)


def missing_finals(context: SweepContext, failures: Mapping[str, str]) -> list[dict[str, Any]]:
    """The settings of the trials that `search.final` asks for by the results so far and that the sweep does not have.

    They are looked for each time: a trial that failed, or was stopped, before the best were chosen may have finished since.
    """
    if context.experiment.search.final is None:
        return []
    others = [
        trial_outcome(context, trial, failures.get(trial.name))
        for trial in context.trials
        if trial.phase != "final"
    ]
    return final_settings(context, ranked_for_final(context, others))


def final_settings(context: SweepContext, ranked: Sequence[RankedPoint]) -> list[dict[str, Any]]:
    """The settings of the trials that `search.final` asks for and that are not there yet, from the ranking of the others."""
    search, seed = context.experiment.search, context.experiment.seed
    if search.final is None:
        return []
    first = seed + search.seeds
    wanted = [
        {**point.settings, "seed": fresh}
        for point in _best_points(context, ranked)
        for fresh in range(first, first + search.final.seeds)
    ]
    there = [_plain(trial.settings) for trial in context.trials if trial.phase == "final"]
    return [settings for settings in wanted if _plain(settings) not in there]


def _best_points(context: SweepContext, ranked: Sequence[RankedPoint]) -> list[RankedPoint]:
    """The best points of all, or those of each value of `search.final.of_each`, in the order in which the sweep has the values."""
    final = context.experiment.search.final
    assert final is not None
    scored = [point for point in ranked if point.values]
    if final.of_each is None:
        return scored[: final.best]
    groups: dict[str, list[RankedPoint]] = {
        _value(trial.settings, final.of_each): [] for trial in context.trials if trial.phase != "final"
    }
    for point in scored:
        groups[_value(point.settings, final.of_each)].append(point)
    return [point for group in groups.values() for point in group[: final.best]]


def _value(settings: Mapping[str, Any], key: str) -> str:
    """The value of a setting, which may be a whole section, as text; settings without it have one value in common."""
    return json.dumps(settings.get(key), sort_keys=True, default=str)


def _plain(settings: Mapping[str, Any]) -> Any:
    """Settings as they come back from a record."""
    return json.loads(json.dumps(settings, default=str))
