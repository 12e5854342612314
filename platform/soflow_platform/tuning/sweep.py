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
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.cluster.ray_internals import import_ray, start_autoscaling_coordinator
from soflow_platform.config.experiment import Experiment, flatten, varied_params
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.evaluation.evaluator import Evaluator
from soflow_platform.evaluation.runner import RayStatisticsRunner
from soflow_platform.registry.versions import propose
from soflow_platform.storage.checkpoints import CheckpointState
from soflow_platform.storage.code_digest import MIXED_CODE_TAG, running_code
from soflow_platform.tracking.environment import DIFF_ARTIFACT, git_diff, host_tags
from soflow_platform.tracking.links import view_state
from soflow_platform.tracking.page_texts import NOTE_TAG
from soflow_platform.tracking.run_names import run_name
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, TrackingStore, tracked_dataset
from soflow_platform.training.dataset import open_data
from soflow_platform.training.job import TrialJob
from soflow_platform.training.launch import fail_trial
from soflow_platform.training.model import network_config
from soflow_platform.training.start import start_of
from soflow_platform.training.stop_request import clear_stops, stop_requested
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.context import (
    SweepContext,
    failed_before,
    finished_trials,
    furthest_first,
    scored_trials,
    trial_outcome,
)
from soflow_platform.tuning.display import TrialOutcome
from soflow_platform.tuning.drawing import (
    DrawnTrials,
    add_trials,
    draws_left,
    final_settings,
    is_complete,
)
from soflow_platform.tuning.progress import start_progress_actor
from soflow_platform.tuning.ranking import RankedPoint, ranked_points
from soflow_platform.tuning.ray_tune import (
    SAVED,
    Terminal,
    TuneSettings,
    concurrent_trials,
    reported_failures,
    run_trials,
)
from soflow_platform.tuning.record import BestTrial, ScoredStep
from soflow_platform.tuning.search_space import Trial
from soflow_platform.tuning.trial import TrialTask
from soflow_platform.tuning.trial_names import named_settings


@dataclass(frozen=True)
class PreparedData:
    """The training data, opened, with its reference statistics computed."""

    location: str
    info: DatasetInfo
    evaluator_tags: Mapping[str, str]
    host_tags: Mapping[str, str]

    def check(self, trial: Trial) -> None:
        """Raises UserError where the data do not fit a trial's network."""
        network_config(trial.experiment, self.info)

    def tags(self, experiment: Experiment) -> dict[str, str]:
        """Tags of the run of a sweep or of a trial with these settings."""
        return {
            "method": experiment.objective.method,
            "network": experiment.network.title,
            **(
                {"plugins": ", ".join(f"{p.module} (sha256 {p.digest})" for p in experiment.plugins)}
                if experiment.plugins
                else {}
            ),
            "data.source": str(experiment.data.source),
            "data.digest": self.info.digest,
            **self.host_tags,
            **self.evaluator_tags,
        }


def run_sweep(context: SweepContext, address: str | None) -> list[TrialOutcome]:
    """Run what is missing of a sweep, choose the best trial, register it, and store the result in the record.

    Raises JobError where no trial could be scored, and Stopped where the sweep was asked to stop.
    """
    # Before anything that takes time: a stop that is requested from here on is meant for this attempt.
    clear_stops(context.project, context.record.id)
    finished = finished_trials(context)
    if all(t.name in finished or t.name in context.failed for t in context.trials) and is_complete(context):
        return conclude_trained(context)
    dashboard = not context.experiment.resources.in_process
    # Two threads that import the same packages at once can find them half imported: Ray's come first.
    import_ray()
    with ThreadPoolExecutor(1) as background:
        # The import of MLflow and the creation of its database take a few seconds, in which this process waits for Ray's.
        opened = background.submit(TrackingStore(context.tracking_uri).prepare)
        with connected(address, dashboard=dashboard) as cluster:
            return _run_on(cluster, context, finished, opened)


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
        return runner.conclude(failures)


def conclude_trained(context: SweepContext) -> list[TrialOutcome]:
    """Choose and register the best trial of a sweep whose trials have all finished; no Ray is needed for it."""
    context.display.say("every trial has finished: choosing the best one")
    prepared = prepare(context)
    runner = SweepRunner(context, open_tracking(context))
    with runner.tracked_run(prepared.tags(context.experiment)):
        return runner.conclude(context.failed)


def open_tracking(context: SweepContext) -> Tracking:
    """The sweep's MLflow experiment."""
    name = context.experiment.tracking.experiment or context.experiment.name
    return Tracking.open(context.tracking_uri, name, context.project)


def prepare(context: SweepContext, cluster: Cluster | None = None) -> PreparedData:
    """Open the data, and compute the reference statistics where they are missing, on the cluster if there is one.

    Raises UserError where the data do not fit a trial's network.
    """
    experiment = context.experiment
    location, info = open_data(experiment, context.project)
    for trial in context.trials:
        network_config(trial.experiment, info)
    with contextlib.ExitStack() as stack:
        compute = None
        if cluster is not None:
            report = stack.enter_context(context.display.describing())
            runner = RayStatisticsRunner(context.project, report=report, cluster=cluster)
            compute = stack.enter_context(runner).one
        evaluator = Evaluator.open(
            experiment.evaluation, info, location, experiment.data.conditional, context.project, compute
        )
    if evaluator.without_grids is not None:
        context.display.say(evaluator.without_grids)
    return PreparedData(location, info, evaluator.tags(), host_tags())


@dataclass(frozen=True)
class TuneStage:
    """What a run of Tune needs beside its trials."""

    cluster: Cluster
    prepared: PreparedData
    concurrent: int
    """Trials that run at the same time."""
    actor: Any
    """The sweep's progress actor."""


@dataclass(frozen=True)
class SweepRunner:
    """One start of a sweep, from its trials to the registered model."""

    context: SweepContext
    tracking: Tracking

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
        self._share_view(record.run)
        try:
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
            searched = [trial for trial in self._scheduled(finished) if trial.phase != "final"]
            failures = dict(context.failed)
            if searched or draws_left(context):
                drawn = DrawnTrials(context, finished, prepared.check) if draws_left(context) else None
                failures |= self._run(stage, searched, drawn)
            if not stop_requested(project, record.id):
                again = self._final_trials(failures)
                if again := [t for t in again if t.name not in finished and t.name not in failures]:
                    failures |= self._run(stage, again, final=True)
            return failures
        finally:
            context.display.stop()

    def _run(
        self, stage: TuneStage, trials: list[Trial], drawn: DrawnTrials | None = None, final: bool = False
    ) -> dict[str, str]:
        """Run trials under Tune, with those that are drawn meanwhile. Returns what failed: trial name -> sentence."""
        record, project, experiment = self.context.record, self.context.project, self.context.experiment
        if final:
            # The last comparison is one of whole trainings.
            search = experiment.search.model_copy(update={"asha": None})
            experiment = experiment.model_copy(update={"search": search})
        name = f"tune-{record.attempts}{'-final' if final else ''}"
        settings = TuneSettings(
            experiment, stage.concurrent, name, project.sweep(record.id), Terminal(self.context.display.say)
        )
        tasks = [self._task(trial, stage.prepared) for trial in trials]
        searcher = None
        if drawn is not None:
            from soflow_platform.tuning.searcher import SweepSearcher

            metric, mode = experiment.search.metric, experiment.mode
            searcher = SweepSearcher(
                tasks, drawn, lambda trial: self._task(trial, stage.prepared), metric, mode
            )
        errors = run_trials(tasks, settings, stage.cluster, stage.actor, searcher)
        reported = reported_failures(tasks, project, stage.actor)
        for task in tasks:
            trial = task.job.trial
            if trial in errors and trial not in reported:
                # Its process was lost too often to say so itself.
                fail_trial(task.job, stage.actor, errors[trial])
                reported[trial] = errors[trial].sentence
        return reported

    def _final_trials(self, failures: Mapping[str, str]) -> list[Trial]:
        """The best points with fresh seeds, which are added to the sweep where it has none yet."""
        context = self.context
        if is_complete(context):
            return [trial for trial in context.trials if trial.phase == "final"]
        outcomes = context.patiently(lambda: self.collect(failures), "reading the trials' checkpoints")
        final = [trial for trial in context.trials if trial.phase == "final"]
        others = [outcome for outcome in outcomes if outcome.name not in {trial.name for trial in final}]
        scored = scored_trials(context.trials, others, context.experiment.search.metric)
        points = final_settings(context, ranked_points(scored, context.experiment.mode))
        if points:
            context.display.say(f"the best points again, with fresh seeds: {len(points)} trials")
            final += add_trials(context, points, "final")
        return final

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

    def _task(self, trial: Trial, prepared: PreparedData) -> TrialTask:
        record = self.context.record
        varied = {f"search.{key}": str(value) for key, value in trial.settings.items()}
        start = start_of(trial.experiment, record.starts)
        job = TrialJob(
            sweep=record.id,
            trial=trial.name,
            experiment=trial.experiment.resolved(),
            data=prepared.location,
            storage=str(self.context.project.root),
            tracking_uri=self.context.tracking_uri,
            run="",
            start=None if start is None else start.as_dict(),
            attempt=record.attempts,
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
            tags={**prepared.tags(trial.experiment), **varied, **({} if start is None else start.tags())},
            rung_steps=self.context.experiment.training.steps,
        )

    def conclude(self, failures: Mapping[str, str]) -> list[TrialOutcome]:
        """Collect how the trials ended, close their runs, choose and register the best. Raises JobError where an outage lasts."""
        outcomes = self.context.patiently(lambda: self.collect(failures), "reading the trials' checkpoints")
        self.context.patiently(lambda: self.close_runs(outcomes), "closing the trials' runs")
        self.context.patiently(lambda: self.register_best(outcomes), "concluding the sweep")
        return outcomes

    def collect(self, failures: Mapping[str, str]) -> list[TrialOutcome]:
        """How each trial ended, by its checkpoints."""
        return [trial_outcome(self.context, trial, failures.get(trial.name)) for trial in self.context.trials]

    def close_runs(self, outcomes: list[TrialOutcome]) -> None:
        """Close the trials' MLflow runs."""
        ends = {TrialState.FAILED: "FAILED", TrialState.STOPPED: "KILLED"}
        states = {o.name: ends.get(o.status.state, "FINISHED") for o in outcomes}
        for run in self.tracking.children(self.context.record.run or ""):
            state = states.get(run.data.tags.get(TRIAL_TAG, ""))
            if state and run.info.status != state:
                self.tracking.finish(run.info.run_id, state)

    def register_best(self, outcomes: list[TrialOutcome]) -> None:
        """Store the best trial in the record, register its EMA weights, and close the sweep's run.

        Raises JobError where no trial was scored.
        """
        record, experiment, project = self.context.record, self.context.experiment, self.context.project
        point, best = self._best(outcomes)
        if best is None or best.best is None:
            reasons = "; ".join(f"{o.name}: {o.status.failure or 'not scored'}" for o in outcomes)
            own = failed_before(project, record, self.context.trials)
            option = " with --retry-failed" if len(own) == len(outcomes) else ""
            raise JobError(
                f"no trial of sweep {record.id} could be scored ({reasons}); the same command{option} tries again."
            )
        step = best.best.step
        store = record.checkpoints(project, best.name)
        checkpoint = next((c for c in store.published() if c.state.step == step), None)
        if checkpoint is None:
            raise JobError(f"the best checkpoint, step {step} of {best.name}, is gone from {store.root}.")
        samples = project.trial(record.id, best.name) / "samples"
        record.best = BestTrial(
            trial=best.name,
            step=step,
            metrics=best.best.metrics,
            grids=[str(path) for path in sorted(samples.glob(f"*-step-{step:08d}.png"))],
            checkpoint=checkpoint.location,
            mean=point.mean if point and point.std is not None else None,
            std=point.std if point else None,
        )
        if experiment.registry.enabled:
            self.context.display.say("registering the best trial")
            made = propose(self.tracking, record.candidate(experiment.model_name), checkpoint)
            record.best = replace(
                record.best,
                model=experiment.model_name,
                version=made.version,
                outdone_by=made.outdone_by,
            )
        failed = any(o.status.state is TrialState.FAILED for o in outcomes)
        stopped = any(o.status.state is TrialState.STOPPED for o in outcomes)
        record.finished = not failed and not stopped
        record.save(project)
        run = record.run or ""
        self.tracking.log_result(run, record.best.as_json())
        self.tracking.finish(run, "FAILED" if failed else "FINISHED")

    def _best(self, outcomes: list[TrialOutcome]) -> tuple[RankedPoint | None, TrialOutcome | None]:
        """The point with the best mean over its seeds, and its best trial; None where no trial was scored."""
        experiment = self.context.experiment
        final = {trial.name for trial in self.context.trials if trial.phase == "final"}
        scored = [
            trial
            for trial in scored_trials(self.context.trials, outcomes, experiment.search.metric)
            if trial.name in final or not final
        ]
        best = next((point for point in ranked_points(scored, experiment.mode) if point.values), None)
        if best is None:
            return None, None
        return best, next(outcome for outcome in outcomes if outcome.name == best.trials[0].name)


def _label(trial: Trial) -> str:
    """What the name of a trial has after its number: `paper`."""
    return trial.name.removeprefix(f"trial-{trial.index:02d}").removeprefix("-")
