"""The driver of a sweep: prepares the data, trains the trials under Ray Tune, chooses the best one and registers it.

It can be interrupted at any point; the same settings go on from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from soflow_core.failures import summarize
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.cluster.ray_internals import import_ray, start_autoscaling_coordinator
from soflow_platform.config.experiment import Experiment, flatten, varied_params
from soflow_platform.errors import Stopped, UserError
from soflow_platform.storage.checkpoints import CheckpointState
from soflow_platform.storage.code_digest import MIXED_CODE_TAG, running_code
from soflow_platform.tracking.environment import DIFF_ARTIFACT, git_diff
from soflow_platform.tracking.links import view_state
from soflow_platform.tracking.page_texts import NOTE_TAG
from soflow_platform.tracking.run_names import run_name
from soflow_platform.tracking.store import TAG_LIMIT, Tracking, TrackingStore, tracked_dataset
from soflow_platform.training.job import TrialJob
from soflow_platform.training.launch import fail_trial
from soflow_platform.training.start import start_of
from soflow_platform.training.stop_request import clear_stops, stop_requested
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.conclusion import Conclusion
from soflow_platform.tuning.context import SweepContext, finished_trials, furthest_first
from soflow_platform.tuning.display import TrialOutcome
from soflow_platform.tuning.drawing import (
    DrawnTrials,
    add_trials,
    draws_left,
    is_complete,
    missing_finals,
)
from soflow_platform.tuning.lineage import describe
from soflow_platform.tuning.population_run import PopulationRun
from soflow_platform.tuning.progress import start_progress_actor
from soflow_platform.tuning.ray_tune import (
    SAVED,
    Terminal,
    TuneSettings,
    concurrent_trials,
    reported_failures,
    run_trials,
)
from soflow_platform.tuning.record import ScoredStep
from soflow_platform.tuning.search_space import Trial
from soflow_platform.tuning.sweep_data import PreparedData, prepare
from soflow_platform.tuning.trial import TrialTask
from soflow_platform.tuning.trial_names import named_settings

LINEAGE_TAG = "lineage"
"""Tag of the run of a trial whose settings changed in mid-run: which trial trained which steps, with which settings."""


def run_sweep(context: SweepContext, address: str | None) -> list[TrialOutcome]:
    """Run what is missing of a sweep, choose the best trial, register it, and store the result in the record.

    Raises JobError where no trial could be scored, and Stopped where the sweep was asked to stop.
    """
    # Before anything that takes time: a stop that is requested from here on is meant for this attempt.
    clear_stops(context.project, context.record.id)
    finished = finished_trials(context)
    ended = all(trial.name in finished or trial.name in context.failed for trial in context.trials)
    if ended and is_complete(context) and not _missing_finals(context, context.failed):
        return conclude_trained(context)
    dashboard = not context.experiment.resources.in_process
    # Two threads that import the same packages at once can find them half imported: Ray's come first.
    import_ray()
    with ThreadPoolExecutor(1) as background:
        # The import of MLflow and the creation of its database take a few seconds, in which this process waits for Ray's.
        opened = background.submit(TrackingStore(context.tracking_uri).prepare)
        with connected(address, dashboard=dashboard) as cluster:
            return _run_on(cluster, context, finished, opened)


def _missing_finals(context: SweepContext, failures: Mapping[str, str]) -> list[dict[str, Any]]:
    """As `missing_finals`, patiently."""
    return context.patiently(lambda: missing_finals(context, failures), "reading the trials' checkpoints")


def _run_on(
    cluster: Cluster, context: SweepContext, finished: Mapping[str, CheckpointState], opened: Future[None]
) -> list[TrialOutcome]:
    """As `run_sweep`; `opened` is done when the tracking store can be used."""
    concurrent = concurrent_trials(context.experiment, cluster)
    if cluster.machines > 1 and context.tracking_uri.startswith("sqlite:"):
        raise UserError(
            f"this cluster has {cluster.machines} machines and SQLite serves one: start a tracking server "
            "(`mlflow server`) and set tracking.uri to its address."
        )
    if not cluster.local:
        start_autoscaling_coordinator()
    context.display.say("preparing data and reference statistics")
    prepared = prepare(context, cluster)
    opened.result()
    runner = SweepRunner(context, open_tracking(context))
    with runner.tracked_run(prepared.tags(context.experiment)):
        failures = runner.train(cluster, prepared, concurrent, finished)
        if stop_requested(context.project, context.record.id):
            raise Stopped(SAVED)
        return runner.conclusion.conclude(failures)


def conclude_trained(context: SweepContext) -> list[TrialOutcome]:
    """Choose and register the best trial of a sweep whose trials have all finished; no Ray is needed for it."""
    context.display.say("every trial has finished: choosing the best one")
    prepared = prepare(context)
    runner = SweepRunner(context, open_tracking(context))
    with runner.tracked_run(prepared.tags(context.experiment)):
        return runner.conclusion.conclude(context.failed)


def open_tracking(context: SweepContext) -> Tracking:
    """The sweep's MLflow experiment."""
    name = context.experiment.tracking.experiment or context.experiment.name
    return Tracking.open(context.tracking_uri, name, context.project)


@dataclass(frozen=True)
class TuneStage:
    """What a run of Tune needs beside its trials."""

    cluster: Cluster
    prepared: PreparedData
    concurrent: int
    """Trials that run at the same time."""
    actor: Any
    """The sweep's progress actor."""
    until: int | None = None
    """The step at which trials pause for others to reach it; None: they go on to their last one."""
    final: bool = False
    """Whether its trials are the best points again."""


@dataclass(frozen=True)
class SweepRunner:
    """One start of a sweep, from its trials to the registered model."""

    context: SweepContext
    tracking: Tracking

    @property
    def conclusion(self) -> Conclusion:
        """Its end."""
        return Conclusion(self.context, self.tracking)

    @contextlib.contextmanager
    def tracked_run(self, tags: Mapping[str, str]) -> Iterator[None]:
        """The sweep's MLflow run, marked FAILED or KILLED with its trials' runs where the block raises.

        Where they cannot be marked, a line says so.
        """
        record, experiment = self.context.record, self.context.experiment
        note = {NOTE_TAG: experiment.description} if experiment.description else {}
        record.run = self.tracking.open_run(
            record.id,
            record.id,
            params=flatten(experiment.resolved()),
            tags={**tags, **note},
            dataset=tracked_dataset(tags),
        )
        record.experiment_id, record.tracking_uri = self.tracking.experiment_id, self.context.tracking_uri
        try:
            self._share_view(record.run)
            yield
        except BaseException as error:
            failed = isinstance(error, Exception) and not isinstance(error, Stopped)
            self._mark_runs(record.run, "FAILED" if failed else "KILLED")
            raise

    def _share_view(self, run: str) -> None:
        """Keep the sweep's page in MLflow: its trials, the best first, with what varies and the scores as columns."""
        experiment = self.context.experiment
        metrics = list(experiment.evaluation.reported(experiment.data.conditional))
        params = varied_params([trial.experiment for trial in self.context.trials])
        view = view_state(run, experiment.search.metric, experiment.mode == "min", params, metrics)
        self.tracking.share_view(run, view)
        self.context.record.view = True

    def _mark_runs(self, parent: str, state: str) -> None:
        try:
            for run in self.tracking.children(parent):
                if run.info.status == "RUNNING":
                    self.tracking.finish(run.info.run_id, state)
            self.tracking.finish(parent, state)
        except Exception as failure:
            # The command reports what ended the block, not this.
            self.context.display.say(
                f"the sweep's runs could not be marked {state} and stay RUNNING until it is started again: {summarize(failure)}"
            )

    def train(
        self,
        cluster: Cluster,
        prepared: PreparedData,
        concurrent: int,
        finished: Mapping[str, CheckpointState],
    ) -> dict[str, str]:
        """Train the trials that have not finished, and those that results lead to. Returns what failed: trial name -> sentence."""
        context, record, project = self.context, self.context.record, self.context.project
        record.attempts += 1
        record.trained_by(project, running_code())
        record.save(project)
        if changes := git_diff():
            self.tracking.client.log_text(record.run or "", changes, DIFF_ARTIFACT.format(record.attempts))
        if len(record.code) > 1:
            self.tracking.client.set_tag(record.run or "", MIXED_CODE_TAG, ", ".join(record.code))
        actor = start_progress_actor(record.id, exported=not cluster.local)
        for name, state in finished.items():
            for evaluation in state.evaluations:
                scored = ScoredStep.of(evaluation)
                actor.add_evaluation.remote(name, scored.step, scored.metrics)
            actor.update.remote(name, {"step": state.step, "state": TrialState.FINISHED})
        for name, failure in context.failed.items():
            actor.update.remote(name, {"state": TrialState.FAILED, "failure": failure})
        stage = TuneStage(cluster, prepared, concurrent, actor)
        context.display.start(record, cluster, actor)
        try:
            if context.experiment.search.pbt is not None:
                population = PopulationRun(
                    context,
                    lambda trials, step: self._run(replace(stage, until=step), trials),
                    self._note_lineage,
                )
                return population.train()
            searched = [trial for trial in self._scheduled(finished) if trial.phase != "final"]
            failures = dict(context.failed)
            drawn = DrawnTrials(context, finished, prepared.check) if draws_left(context) else None
            if searched or (drawn is not None and drawn.left):
                failures |= self._run(stage, searched, drawn)
            if not stop_requested(project, record.id):
                again = self._final_trials(failures)
                if again := [t for t in again if t.name not in finished and t.name not in failures]:
                    failures |= self._run(replace(stage, final=True), again)
            return failures
        finally:
            context.display.stop()

    def _run(self, stage: TuneStage, trials: list[Trial], drawn: DrawnTrials | None = None) -> dict[str, str]:
        """Run trials under Tune, with those that are drawn meanwhile. Returns what failed: trial name -> sentence."""
        record, project, experiment = self.context.record, self.context.project, self.context.experiment
        if stage.final:
            # The last comparison is one of whole trainings.
            search = experiment.search.model_copy(update={"asha": None})
            experiment = experiment.model_copy(update={"search": search})
        part = "-final" if stage.final else "" if stage.until is None else f"-to-{stage.until}"
        name = f"tune-{record.attempts}{part}"
        settings = TuneSettings(
            experiment, stage.concurrent, name, project.sweep(record.id), Terminal(self.context.display.say)
        )
        tasks = [self._task(trial, stage) for trial in trials]
        searcher = None
        if drawn is not None:
            from soflow_platform.tuning.searcher import SweepSearcher

            metric, mode = experiment.search.metric, experiment.mode
            searcher = SweepSearcher(tasks, drawn, lambda trial: self._task(trial, stage), metric, mode)
        errors = run_trials(tasks, settings, stage.cluster, stage.actor, searcher)
        reported = reported_failures(tasks, project, stage.actor)
        for task in tasks:
            trial = task.job.trial
            if trial in errors and trial not in reported:
                # Its process was lost too often to say so itself.
                fail_trial(task.job, stage.actor, errors[trial])
                reported[trial] = errors[trial].sentence
        return reported

    def _note_lineage(self, trial: str) -> None:
        """Keep with a trial's run which settings it had and has, by intervals of steps."""
        context, tracking = self.context, self.tracking
        history = context.record.history(trial)
        values = {f"search.{key}": str(value) for key, value in history[-1].settings.items()}
        lineage = describe(history, context.experiment.training.steps)[:TAG_LIMIT]

        def note() -> None:
            run = tracking.find(context.record.id, trial)
            if run is None:
                return
            for key, value in {**values, LINEAGE_TAG: lineage}.items():
                tracking.client.set_tag(run.info.run_id, key, value)

        context.patiently(note, "noting settings that have changed")

    def _final_trials(self, failures: Mapping[str, str]) -> list[Trial]:
        """The best points with fresh seeds; those that the sweep does not have yet are added to it."""
        context = self.context
        points = _missing_finals(context, failures)
        if points:
            context.display.say(f"the best points again, with fresh seeds: {len(points)} trials")
            add_trials(context, points, "final")
        return [trial for trial in context.trials if trial.phase == "final"]

    def _scheduled(self, finished: Mapping[str, CheckpointState]) -> list[Trial]:
        """The trials for Tune: the unfinished ones, and before them those whose evaluations its scheduler compares theirs with."""
        trials = self.context.trials
        ended = finished.keys() | self.context.failed.keys()
        unfinished = [trial for trial in trials if trial.name not in ended]
        if self.context.experiment.search.asha is None:
            return unfinished
        # The scheduler begins with empty rungs: those that got furthest and were best report first, so that a trial that was ended
        # at a rung meets the ones that were better, and is ended there again.
        unfinished = self.context.patiently(
            lambda: furthest_first(self.context, unfinished), "reading the trials' checkpoints"
        )
        return [*(trial for trial in trials if trial.name in finished), *unfinished]

    def _task(self, trial: Trial, stage: TuneStage) -> TrialTask:
        record = self.context.record
        varied = {f"search.{key}": str(value) for key, value in trial.settings.items()}
        # In a population with what its rungs have changed so far.
        experiment = Experiment(**record.recipe(trial.name)) if record.rungs else trial.experiment
        start = start_of(trial.experiment, record.starts)
        job = TrialJob(
            sweep=record.id,
            trial=trial.name,
            experiment=experiment.resolved(),
            data=stage.prepared.location,
            storage=str(self.context.project.root),
            tracking_uri=self.context.tracking_uri,
            run="",
            start=None if start is None else start.as_dict(),
            attempt=record.attempts,
            until=stage.until,
        )
        return TrialTask(
            job=job,
            tracking_experiment_id=self.tracking.experiment_id,
            parent=record.run or "",
            name=run_name(
                trial.index,
                named_settings(trial.settings, self.context.experiment.search),
                None if trial.settings else _label(trial),
            ),
            tags={
                **stage.prepared.tags(trial.experiment),
                **varied,
                **({} if start is None else start.tags()),
            },
            rung_steps=self.context.experiment.training.steps,
        )


def _label(trial: Trial) -> str:
    """What the name of a trial has after its number: `paper`."""
    return trial.name.removeprefix(f"trial-{trial.index:02d}").removeprefix("-")
