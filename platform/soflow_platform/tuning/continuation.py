"""Trials that go on from a shorter training of the same settings in another sweep of the project: `training.steps` was raised.

Where nothing of the settings depends on the total, the longer training is the shorter one and what follows. Its last checkpoint is
copied to the new trial, which resumes from it; the older sweep keeps all that it has. Where a schedule runs over the total, the
trial is trained anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from soflow_core.failures import InputError
from soflow_pipelines.preparation.builtin import Expected
from soflow_platform.config.experiment import Experiment
from soflow_platform.storage.checkpoints import EMA, STATE, Checkpoint
from soflow_platform.storage.code_digest import running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tuning.record import SweepRecord
from soflow_platform.tuning.recorded import records_of
from soflow_platform.tuning.search_space import Trial


@dataclass(frozen=True)
class Shorter:
    """A shorter training of a trial's settings."""

    sweep: str
    trial: str
    checkpoint: Checkpoint
    scored_alike: bool
    """Whether its scores are by the trial's own protocol."""

    @property
    def step(self) -> int:
        return self.checkpoint.state.step


@dataclass(frozen=True)
class Continuations:
    """What of a sweep's trials was trained before, for fewer steps."""

    found: dict[str, Shorter]
    """By trial: what it goes on from."""
    anew: dict[str, str]
    """By trial: why it does not go on from a shorter training that there is."""

    def sentences(self) -> list[str]:
        """What a user is told."""
        lines = []
        for sweep in dict.fromkeys(shorter.sweep for shorter in self.found.values()):
            steps = sorted({each.step for each in self.found.values() if each.sweep == sweep})
            span = f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
            count = sum(each.sweep == sweep for each in self.found.values())
            lines.append(f"{count} trial(s) go on from step {span} of sweep {sweep}, which is kept")
        for reason in dict.fromkeys(self.anew.values()):
            count = sum(each == reason for each in self.anew.values())
            lines.append(f"{count} trial(s) are trained anew, although a shorter training is there: {reason}")
        return lines


def find_continuations(
    project: ProjectFolder,
    record: SweepRecord,
    trials: Sequence[Trial],
    dependence: Callable[[Experiment, int], str | None],
) -> Continuations:
    """What the trials that have no checkpoint can go on from.

    `dependence(experiment, steps)` says what of a shorter training depends on its length, as `training.length_dependence` does.
    """
    shorter = _shorter_trainings(project, record, trials)
    found: dict[str, Shorter] = {}
    anew: dict[str, str] = {}
    for trial in trials:
        candidates = shorter.get(trial.name, [])
        if (
            not candidates
            or trial.experiment.search.pbt
            or record.checkpoints(project, trial.name).published()
        ):
            continue
        older, entry, experiment = max(candidates, key=lambda each: each[2].training.steps)
        steps = trial.experiment.training.steps
        reason = _obstacle(project, older, experiment) or dependence(experiment, steps)
        if reason is not None:
            anew[trial.name] = reason
            continue
        checkpoint, _ = older.checkpoints(project, entry).newest([EMA, STATE])
        if checkpoint is not None and checkpoint.state.step < steps:
            alike = experiment.scoring_digest() == trial.experiment.scoring_digest()
            found[trial.name] = Shorter(older.id, entry, checkpoint, alike)
    return Continuations(found, anew)


def _obstacle(project: ProjectFolder, older: SweepRecord, experiment: Experiment) -> str | None:
    """What beside its schedules keeps a training from being gone on with."""
    if older.other_files(project, running_code()):
        return f"other code than this trained it (sweep {older.id})"
    if experiment.training.ema_profiles:
        return "the snapshots of its averages (training.ema_profiles) belong to the shorter one"
    return None


def _shorter_trainings(
    project: ProjectFolder, record: SweepRecord, trials: Sequence[Trial]
) -> dict[str, list[tuple[SweepRecord, str, Experiment]]]:
    """By trial: sweeps of the same name and their trials, which differ from it in being shorter alone."""
    wanted: dict[str, list[Trial]] = {}
    for trial in trials:
        wanted.setdefault(trial.experiment.continuation_digest(), []).append(trial)
    found: dict[str, list[tuple[SweepRecord, str, Experiment]]] = {}
    for older in records_of(project, record.name):
        if older.id == record.id or not older.attempts:
            continue
        for entry in older.trials:
            with suppress(InputError, ValueError, TypeError, KeyError):
                # What this version cannot read is passed over.
                experiment = Experiment(**older.recipe(entry.name))
                for trial in wanted.get(experiment.continuation_digest(), []):
                    if experiment.training.steps < trial.experiment.training.steps:
                        found.setdefault(trial.name, []).append((older, entry.name, experiment))
    return found


def continue_trial(project: ProjectFolder, record: SweepRecord, trial: Trial, shorter: Shorter) -> None:
    """Copy the checkpoint that a trial goes on from into its own, complete or not at all. Raises StorageError where that fails."""
    from soflow_platform.training.state_files import opened_state, write_state

    before = shorter.checkpoint
    scores = before.state.evaluations if shorter.scored_alike else []
    state = replace(before.state, run="", evaluations=scores, pending_metrics=_points(scores))

    def write(folder: Path) -> dict[str, str]:
        with before.opened(EMA) as weights, opened_state(before) as content:
            shutil.copyfile(weights, folder / EMA)
            # The totals are equal where a training resumes; nothing of this one depends on its own.
            return write_state(folder, {**content, "total_steps": trial.experiment.training.steps}, None)

    record.checkpoints(project, trial.name).publish(state, write)


def _points(scores: Sequence[dict[str, Any]]) -> list[Any]:
    """The scores as points of the new run's curves."""
    now = int(time.time() * 1000)
    return [
        [name, float(value), now, each["step"]]
        for each in scores
        for name, value in each.items()
        if name != "step"
    ]


def continue_trials(
    project: ProjectFolder,
    record: SweepRecord,
    trials: Sequence[Trial],
    data: Expected,
    say: Callable[[str], None],
) -> None:
    """Give the trials of a sweep the checkpoints that they can go on from, and say which do and why others do not."""
    known: dict[tuple[str, int], str | None] = {}

    def dependence(experiment: Experiment, steps: int) -> str | None:
        from soflow_platform.training.length_dependence import length_dependence
        from soflow_platform.training.model import describe_network

        key = experiment.continuation_digest(), steps
        if key not in known:
            known[key] = length_dependence(experiment, describe_network(experiment, data).small(), steps)
        return known[key]

    continuations = find_continuations(project, record, trials, dependence)
    for sentence in continuations.sentences():
        say(sentence)
    for trial in trials:
        if trial.name in continuations.found:
            continue_trial(project, record, trial, continuations.found[trial.name])
