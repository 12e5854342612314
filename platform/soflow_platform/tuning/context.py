"""A sweep with the places where it is kept and shown, and what has become of its trials so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from soflow_core.failures import InputError
from soflow_platform.config.document import Document
from soflow_platform.config.experiment import Experiment
from soflow_platform.storage.checkpoints import EMA, CheckpointState
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.storage.retry import retry
from soflow_platform.tracking.outages import is_away
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_status import TrialState, TrialStatus, read_status
from soflow_platform.tuning.display import Display, TrialOutcome
from soflow_platform.tuning.ranking import ScoredTrial, sort_key
from soflow_platform.tuning.record import ScoredStep, SweepRecord
from soflow_platform.tuning.search_space import Trial

T = TypeVar("T")


@dataclass(frozen=True)
class SweepContext:
    """A sweep and where it is kept and shown."""

    record: SweepRecord
    experiment: Experiment
    trials: list[Trial]
    """Those of the file, and those that results have led to, which are appended while the sweep runs."""
    project: ProjectFolder
    display: Display
    written: Document | None = None
    """The sweep file as it was written, of which further trials are made."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Trials that failed before and are not tried again, with the reason."""

    @property
    def document(self) -> Document:
        """The file; where it is not known, its settings in full."""
        return self.written or Document(self.experiment.resolved())

    @property
    def tracking_uri(self) -> str:
        return self.experiment.tracking.uri or self.project.tracking_uri

    def patiently(self, action: Callable[[], T], description: str) -> T:
        """What `action` returns, tried again through an outage. Raises JobError where that lasts."""
        return retry(
            action,
            description=description,
            timeout=60 * self.experiment.training.patience_minutes,
            log=self.display.say,
            is_transient=is_away,
        )


def finished_trials(context: SweepContext) -> dict[str, CheckpointState]:
    """The trials with a sound checkpoint of their last step, and its state. Raises JobError where an outage lasts."""
    if not context.record.attempts:
        return {}

    def look() -> dict[str, CheckpointState]:
        finished = {}
        for trial in context.trials:
            newest, _ = context.record.checkpoints(context.project, trial.name).newest([EMA])
            if newest is not None and newest.state.step == trial.experiment.training.steps:
                finished[trial.name] = newest.state
        return finished

    return context.patiently(look, "reading the trials' checkpoints")


def furthest_first(context: SweepContext, trials: Sequence[Trial]) -> list[Trial]:
    """Trials by the share of their training at their last evaluation, then by its value at rungs; those without one last, in order."""
    metric, mode = context.experiment.rung_metric

    def key(trial: Trial) -> tuple[float, float]:
        newest, _ = context.record.checkpoints(context.project, trial.name).newest([EMA])
        scored = newest.state.evaluations[-1:] if newest is not None else []
        if not scored:
            return 0.0, math.inf
        reached = scored[0]["step"] / trial.experiment.training.steps
        return -reached, sort_key(scored[0].get(metric), mode)

    return sorted(trials, key=key)


def failed_before(project: ProjectFolder, record: SweepRecord, trials: Sequence[Trial]) -> dict[str, str]:
    """The trials that failed by their own fault, and why: with the same code and settings they would fail again.

    A trial that failed by a lost machine, by a storage that was away or by input that can be mended is none of them.
    """
    failed = {}
    for trial in trials:
        with suppress(InputError, OSError):
            # One that cannot be read is tried again.
            status = read_status(project.trial(record.id, trial.name))
            if status is not None and status.state is TrialState.FAILED and status.own_fault:
                failed[trial.name] = status.failure or "it failed"
    return failed


def trial_outcome(context: SweepContext, trial: Trial, failure: str | None) -> TrialOutcome:
    """How a trial ended, by its checkpoints and its failure."""
    record, experiment = context.record, context.experiment
    store = record.checkpoints(context.project, trial.name)
    # Only the weights are used from here on; the rest is verified where training resumes from it.
    newest, _ = store.newest([EMA])
    step, steps = newest.state.step if newest else 0, trial.experiment.training.steps
    scored = store.best(experiment.search.metric, experiment.mode)
    if failure is not None:
        state = TrialState.FAILED
    elif step == steps:
        state = TrialState.FINISHED
    elif stop_requested(context.project, record.id, trial.name):
        state = TrialState.STOPPED
    elif experiment.search.pbt is not None and _waits(context, trial):
        # The sweep ended before its population went on from a rung.
        state = TrialState.STOPPED
    else:
        state = TrialState.PRUNED
    status = TrialStatus(state=state, step=step, steps=steps, failure=failure)
    return TrialOutcome(trial.name, status, ScoredStep.of(scored[1]) if scored else None)


def _waits(context: SweepContext, trial: Trial) -> bool:
    """Whether a trial has come to a rung, at which it waits for others."""
    with suppress(InputError, OSError):
        status = read_status(context.project.trial(context.record.id, trial.name))
        return status is not None and status.state is TrialState.WAITING
    return False


def scored_trials(
    trials: Sequence[Trial], outcomes: Sequence[TrialOutcome], metric: str
) -> list[ScoredTrial]:
    """The trials with the best value that each has of the metric; failed trials have none."""
    settings = {trial.name: trial.settings for trial in trials}
    return [
        ScoredTrial(
            outcome.name,
            settings[outcome.name],
            None
            if outcome.best is None or outcome.status.state is TrialState.FAILED
            else outcome.best.metrics[metric],
        )
        for outcome in outcomes
    ]
