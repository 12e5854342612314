"""The driver of a sweep: prepares the data, trains the trials under Ray Tune, chooses the best one and registers it.

It can be interrupted at any point; the same settings go on from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from soflow_core.failures import summarize
from soflow_pipelines.shards.info import DatasetInfo
from soflow_platform.cluster.connection import Cluster, connected
from soflow_platform.cluster.ray_internals import import_ray, start_autoscaling_coordinator
from soflow_platform.config.experiment import Experiment, flatten, varied_params
from soflow_platform.errors import JobError, Stopped, UserError
from soflow_platform.evaluation.evaluator import Evaluator
from soflow_platform.evaluation.runner import RayStatisticsRunner
from soflow_platform.registry.versions import propose
from soflow_platform.storage.checkpoints import EMA, CheckpointState
from soflow_platform.storage.code_digest import MIXED_CODE_TAG, running_code
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.storage.retry import retry
from soflow_platform.tracking.environment import DIFF_ARTIFACT, git_diff, host_tags
from soflow_platform.tracking.links import view_state
from soflow_platform.tracking.outages import is_away
from soflow_platform.tracking.run_names import run_name
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, TrackingStore, tracked_dataset
from soflow_platform.training.dataset import open_data
from soflow_platform.training.job import TrialJob
from soflow_platform.training.launch import fail_trial
from soflow_platform.training.model import network_config
from soflow_platform.training.stop_request import clear_stops, stop_requested
from soflow_platform.training.trial_status import TrialState, TrialStatus
from soflow_platform.tuning.display import Display, TrialOutcome
from soflow_platform.tuning.progress import start_progress_actor
from soflow_platform.tuning.ray_tune import (
    TuneSettings,
    concurrent_trials,
    reported_failures,
    run_trials,
)
from soflow_platform.tuning.record import BestTrial, ScoredStep, SweepRecord
from soflow_platform.tuning.search_space import Trial
from soflow_platform.tuning.trial import TrialTask

T = TypeVar("T")


@dataclass(frozen=True)
class SweepContext:
    """A sweep and where it is kept and shown."""

    record: SweepRecord
    experiment: Experiment
    trials: list[Trial]
    project: ProjectFolder
    display: Display

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


@dataclass(frozen=True)
class PreparedData:
    """The training data, opened, with its reference statistics computed."""

    location: str
    info: DatasetInfo
    evaluator_tags: Mapping[str, str]
    host_tags: Mapping[str, str]

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
    if len(finished) == len(context.trials):
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
            raise Stopped(
                "the sweep was asked to stop and its trials are saved: run the same command to go on."
            )
        return runner.conclude(failures)


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


def conclude_trained(context: SweepContext) -> list[TrialOutcome]:
    """Choose and register the best trial of a sweep whose trials have all finished; no Ray is needed for it."""
    context.display.say("every trial has finished: choosing the best one")
    prepared = prepare(context)
    runner = SweepRunner(context, open_tracking(context))
    with runner.tracked_run(prepared.tags(context.experiment)):
        return runner.conclude({})


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
        note = {"mlflow.note.content": experiment.description} if experiment.description else {}
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
        """Train the trials that have not finished. Returns what failed: trial name -> sentence."""
        record, project = self.context.record, self.context.project
        record.attempts += 1
        record.trained_by(project, running_code())
        record.save(project)
        if changes := git_diff():
            self.tracking.client.log_text(record.run or "", changes, DIFF_ARTIFACT.format(record.attempts))
        if len(record.code) > 1:
            self.tracking.client.set_tag(record.run or "", MIXED_CODE_TAG, ", ".join(record.code))
        tasks = [self._task(trial, prepared) for trial in self._scheduled(finished)]
        settings = TuneSettings(
            self.context.experiment, concurrent, record.attempts, project.sweep(record.id)
        )
        actor = start_progress_actor(record.id)
        for name, state in finished.items():
            for evaluation in state.evaluations:
                scored = ScoredStep.of(evaluation)
                actor.add_evaluation.remote(name, scored.step, scored.metrics)
            actor.update.remote(name, {"step": state.step, "state": TrialState.FINISHED})
        self.context.display.start(record, cluster, actor)
        try:
            errors = run_trials(tasks, settings, cluster, actor)
            reported = reported_failures(tasks, project, actor)
            for task in tasks:
                trial = task.job.trial
                if trial in errors and trial not in reported:
                    # Its process was lost too often to say so itself.
                    fail_trial(task.job, actor, errors[trial])
                    reported[trial] = errors[trial].sentence
            return reported
        finally:
            self.context.display.stop()

    def _scheduled(self, finished: Mapping[str, CheckpointState]) -> list[Trial]:
        """The trials for Tune: the unfinished ones, and before them those whose evaluations its scheduler compares theirs with."""
        trials = self.context.trials
        unfinished = [trial for trial in trials if trial.name not in finished]
        if self.context.experiment.search.asha is None:
            return unfinished
        return [*(trial for trial in trials if trial.name in finished), *unfinished]

    def _task(self, trial: Trial, prepared: PreparedData) -> TrialTask:
        record = self.context.record
        varied = {f"search.{key}": str(value) for key, value in trial.settings.items()}
        job = TrialJob(
            sweep=record.id,
            trial=trial.name,
            experiment=trial.experiment.resolved(),
            data=prepared.location,
            storage=str(self.context.project.root),
            tracking_uri=self.context.tracking_uri,
            run="",
            attempt=record.attempts,
        )
        return TrialTask(
            job=job,
            tracking_experiment_id=self.tracking.experiment_id,
            parent=record.run or "",
            name=run_name(trial.index, trial.settings, None if trial.settings else _label(trial)),
            tags={**prepared.tags(trial.experiment), **varied},
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
        best = best_outcome(outcomes, experiment.search.metric, experiment.mode)
        if best is None or best.best is None:
            reasons = "; ".join(f"{o.name}: {o.status.failure or 'not scored'}" for o in outcomes)
            raise JobError(
                f"no trial of sweep {record.id} could be scored ({reasons}); the same command tries again."
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


def _label(trial: Trial) -> str:
    """What the name of a trial has after its number: `paper`."""
    return trial.name.removeprefix(f"trial-{trial.index:02d}").removeprefix("-")


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
    else:
        state = TrialState.PRUNED
    status = TrialStatus(state=state, step=step, steps=steps, failure=failure)
    return TrialOutcome(trial.name, status, ScoredStep.of(scored[1]) if scored else None)


def best_outcome(outcomes: list[TrialOutcome], metric: str, mode: str) -> TrialOutcome | None:
    """The trial with the best value of the metric, the earlier of two equals; failed trials do not count."""
    sign = 1 if mode == "min" else -1
    best: tuple[float, TrialOutcome] | None = None
    for outcome in outcomes:
        if outcome.best is None or outcome.status.state is TrialState.FAILED:
            continue
        value = sign * outcome.best.metrics[metric]
        if best is None or value < best[0]:
            best = value, outcome
    return best[1] if best else None
