"""How a sweep ends: what became of its trials, which is the best, and its registration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from soflow_platform.errors import JobError
from soflow_platform.registry.versions import propose
from soflow_platform.tracking.store import TRIAL_TAG, Tracking
from soflow_platform.training.trial_status import TrialState
from soflow_platform.tuning.context import SweepContext, failed_before, scored_trials, trial_outcome
from soflow_platform.tuning.display import TrialOutcome
from soflow_platform.tuning.ranking import RankedPoint, ranked_points
from soflow_platform.tuning.record import BestTrial


@dataclass(frozen=True)
class Conclusion:
    """The end of one start of a sweep."""

    context: SweepContext
    tracking: Tracking

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
            counted = self._counted(outcomes)
            reasons = "; ".join(f"{o.name}: {o.status.failure or 'not scored'}" for o in counted)
            own = failed_before(project, record, self.context.trials)
            option = " with --retry-failed" if all(o.name in own for o in counted) else ""
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
        run = record.run or ""
        self.tracking.log_result(run, record.best.as_json())
        self.tracking.finish(run, "FAILED" if failed else "FINISHED")
        # Last: of a sweep that is finished the same command does nothing more, and its run would stay RUNNING.
        record.finished = not failed and not stopped
        record.save(project)

    def _best(self, outcomes: list[TrialOutcome]) -> tuple[RankedPoint | None, TrialOutcome | None]:
        """The point with the best mean over its seeds, and its best trial; None where no trial was scored."""
        experiment = self.context.experiment
        counted = {outcome.name for outcome in self._counted(outcomes)}
        scored = [
            trial
            for trial in scored_trials(self.context.trials, outcomes, experiment.search.metric)
            if trial.name in counted
        ]
        best = next((point for point in ranked_points(scored, experiment.mode) if point.values), None)
        if best is None:
            return None, None
        return best, next(outcome for outcome in outcomes if outcome.name == best.trials[0].name)

    def _counted(self, outcomes: list[TrialOutcome]) -> list[TrialOutcome]:
        """The trials that the best is chosen from: those of `search.final`, or all where there are none."""
        final = {trial.name for trial in self.context.trials if trial.phase == "final"}
        return [outcome for outcome in outcomes if outcome.name in final or not final]
