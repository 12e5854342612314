"""Trains a population (`search.pbt`) from rung to rung: all trials to a step, then the decision, then the copies, and on.

The decision is in the record before anything is copied, and a copy says whose it is, so that a sweep that was cut at any point goes on
with the population, settings and schedule that it had.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from soflow_platform.config.experiment import Experiment
from soflow_platform.config.mid_run import SettingsChange, rebuilt_for, with_changes
from soflow_platform.config.search import PbtConfig
from soflow_platform.errors import UserError
from soflow_platform.storage.checkpoints import EMA, Checkpoint, CheckpointStore
from soflow_platform.training.stop_request import stop_requested
from soflow_platform.training.trial_log import LOG, TrialLog
from soflow_platform.training.trial_status import TrialState, read_status
from soflow_platform.tuning.context import SweepContext, failed_before
from soflow_platform.tuning.lineage import Replacement, Rung, describe_settings, short_name
from soflow_platform.tuning.points import SearchSpace
from soflow_platform.tuning.population import Population
from soflow_platform.tuning.search_space import Trial

TrainTo = Callable[[list[Trial], int], dict[str, str]]
"""Trains trials to a step under Tune. Returns what failed: trial name -> sentence."""


def rung_steps(pbt: PbtConfig, steps: int) -> list[int]:
    """The steps at which a population is compared, before the last one."""
    return list(range(pbt.every, steps, pbt.every))


@dataclass(frozen=True)
class PopulationRun:
    """One start of a sweep that trains a population."""

    context: SweepContext
    train_to: TrainTo
    noted: Callable[[str], None]
    """Told the name of each trial whose history has changed."""

    def train(self) -> dict[str, str]:
        """Train the trials through all rungs to the last step. Returns what failed: trial name -> sentence.

        It ends at a rung that a trial did not reach by a fault that is not its own: the same command goes on from there. Trials that
        fail by their own fault, that a rule of `search.stop` ends or that were asked to stop leave the population.
        """
        context, record = self.context, self.context.record
        pbt, steps = context.experiment.search.pbt, context.experiment.training.steps
        assert pbt is not None
        failures = dict(context.failed)
        members = [trial for trial in context.trials if trial.name not in failures]
        for step in [*rung_steps(pbt, steps), steps]:
            rung = next((rung for rung in record.rungs if rung.step == step), None)
            if rung is None:
                failures |= self._bring(members, step)
                members = [trial for trial in members if self._goes_on(trial, step, failures)]
                own = failed_before(context.project, record, context.trials)
                if stop_requested(context.project, record.id) or failures.keys() - own.keys():
                    return failures
                if step == steps:
                    return failures
                rung = self._decide(members, step)
            for replacement in rung.replaced:
                if any(trial.name == replacement.trial for trial in members):
                    self._apply(replacement, rung)
        return failures

    def _bring(self, members: list[Trial], step: int) -> dict[str, str]:
        """Train those that have not reached a step to it."""
        behind = [trial for trial in members if not self._reached(trial, step)]
        return self.train_to(behind, step) if behind else {}

    def _reached(self, trial: Trial, step: int) -> bool:
        """Whether a trial has trained to a step and was scored there; one that a rule of `search.stop` has ended goes no further."""
        newest = self._newest(trial.name)
        if newest is None or newest.state.step < step or newest.state.ended is not None:
            return False
        return newest.state.step > step or _score(newest, step) is not None

    def _goes_on(self, trial: Trial, step: int, failures: Mapping[str, str]) -> bool:
        status = read_status(self.context.project.trial(self.context.record.id, trial.name))
        ended = status is not None and status.state is TrialState.PRUNED
        return trial.name not in failures and not ended and self._reached(trial, step)

    def _newest(self, trial: str) -> Checkpoint | None:
        store = self._store(trial)
        return self.context.patiently(lambda: store.newest([EMA])[0], "reading the trials' checkpoints")

    def _store(self, trial: str) -> CheckpointStore:
        return self.context.record.checkpoints(self.context.project, trial)

    def _decide(self, members: list[Trial], step: int) -> Rung:
        """The decision at a step, which is stored in the record."""
        context, record, experiment = self.context, self.context.record, self.context.experiment
        metric, mode = experiment.rung_metric
        pbt = experiment.search.pbt
        assert pbt is not None
        scores = {}
        for trial in members:
            newest = self._newest(trial.name)
            scored = None if newest is None else _score(newest, step)
            # One that has gone beyond this step, where it had no part in the decision, has none here either.
            if scored is not None:
                scores[trial.name] = float(scored.get(metric, math.nan))
        search = SearchSpace(experiment.search, experiment.resolved())
        population = Population(pbt, mode, search.dimensions, self._allows(search), experiment.seed)
        rung = population.decide(step, scores, {name: record.history(name)[-1].settings for name in scores})
        record.rungs.append(rung)
        context.patiently(lambda: record.save(context.project), "storing what was decided at a rung")
        context.display.say(_sentence(rung, metric))
        for replacement in rung.replaced:
            self._log(replacement, rung, metric)
            self.noted(replacement.trial)
        return rung

    def _allows(self, search: SearchSpace) -> Callable[[Mapping[str, Any]], bool]:
        base = self.context.experiment

        def allows(settings: Mapping[str, Any]) -> bool:
            try:
                change = SettingsChange(after=1, settings=dict(settings))
                changed = Experiment(**with_changes(base.resolved(), [change]))
                return search.allows(settings) and rebuilt_for(base.objective, changed.objective) is None
            except (ValidationError, UserError, ValueError):
                return False

        return allows

    def _log(self, replacement: Replacement, rung: Rung, metric: str) -> None:
        score = {name: _shown(rung.scores[name]) for name in (replacement.trial, replacement.source)}
        folder = self.context.project.trial(self.context.record.id, replacement.trial)
        folder.mkdir(parents=True, exist_ok=True)
        TrialLog(folder / LOG).write(
            f"{metric} {score[replacement.trial]} is among the worst: goes on from {replacement.source} ({score[replacement.source]}), "
            f"with {describe_settings(replacement.after)} in place of {describe_settings(replacement.before)}",
            rung.step,
        )

    def _apply(self, replacement: Replacement, rung: Rung) -> None:
        """Give a trial the checkpoint that it goes on from in the place of its own, unless it has it already."""
        target = self._store(replacement.trial)

        def copy() -> None:
            if any(
                checkpoint.state.step > rung.step
                or (checkpoint.state.step == rung.step and checkpoint.state.copied_from == replacement.source)
                for checkpoint in target.published()
            ):
                return
            # What it trained until here leads to none of its weights any longer.
            target.discard_after(0)
            sound, _ = self._store(replacement.source).newest()
            if sound is not None and sound.state.step == rung.step:
                copy_checkpoint(sound, target, replacement.source)
            # Else the other one has lost it, or gone on: the trial is trained again from the first step, through all settings that
            # its lineage had, to the same weights.

        self.context.patiently(copy, f"copying a checkpoint to {replacement.trial}")


def copy_checkpoint(before: Checkpoint, target: CheckpointStore, source: str) -> None:
    """Copy another trial's checkpoint, complete or not at all, with its score at that step. Raises StorageError where that fails."""
    step = before.state.step
    scored = [each for each in before.state.evaluations if each["step"] == step]
    state = replace(before.state, run="", evaluations=scored, pending_metrics=[], copied_from=source)

    def write(folder: Path) -> None:
        with before.opened_all(list(before.files)) as paths:
            for path in paths:
                shutil.copyfile(path, folder / path.name)

    target.publish(state, write)


def _score(checkpoint: Checkpoint, step: int) -> dict[str, Any] | None:
    """The evaluation of a step."""
    return next((each for each in checkpoint.state.evaluations if each["step"] == step), None)


def _sentence(rung: Rung, metric: str) -> str:
    """What was decided at a rung."""
    moves = ", ".join(f"{short_name(each.trial)} from {short_name(each.source)}" for each in rung.replaced)
    replaced = f"go on with other settings: {moves}" if moves else "none is replaced"
    return f"step {rung.step:,}: {len(rung.scores)} trials compared by {metric}; {replaced}"


def _shown(score: float | None) -> str:
    return "nan" if score is None else f"{score:.4g}"
