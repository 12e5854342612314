"""What the report of a sweep shows, read from its record, the checkpoints and status files of its trials, and MLflow."""

from __future__ import annotations

import bisect
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soflow_core.failures import summarize
from soflow_core.objectives import AlphaFlow, SoFlow
from soflow_platform.config.experiment import Experiment, flatten
from soflow_platform.storage.checkpoints import best_evaluation
from soflow_platform.storage.project import ProjectFolder
from soflow_platform.tracking.store import TRIAL_TAG, Tracking, TrackingStore
from soflow_platform.training.trial_status import read_status
from soflow_platform.tuning.lineage import changes
from soflow_platform.tuning.points import PointSettings
from soflow_platform.tuning.ranking import Gap, RankedPoint, ScoredTrial, gaps_to_best, ranked_points
from soflow_platform.tuning.record import ScoredStep, SweepRecord
from soflow_platform.tuning.recorded import trials_of_record
from soflow_platform.tuning.search_space import Trial
from soflow_platform.tuning.status import sweep_state, trial_reports

CURVE_POINTS = 200
"""Points of a schedule's curve."""
STEP_SECONDS = "system/step_seconds"


@dataclass(frozen=True)
class ReportedTrial:
    """One trial of the report."""

    trial: Trial
    state: str
    step: int
    failure: str | None
    evaluations: list[dict[str, Any]]
    best: ScoredStep | None
    seconds: list[tuple[int, float]]
    """(step, seconds of its devices until then), at increasing steps; empty where no speed was logged."""
    grids: list[Path]
    """Sample grids of its best evaluation."""
    command: str
    """Trains it anew."""

    @property
    def name(self) -> str:
        return self.trial.name

    def seconds_at(self, step: int) -> float | None:
        """Device-seconds of training until a step, interpolated."""
        if not self.seconds or step <= 0:
            return None
        before = (0, 0.0)
        for at in self.seconds:
            if step <= at[0]:
                share = (step - before[0]) / (at[0] - before[0])
                return before[1] + share * (at[1] - before[1])
            before = at
        return before[1] * step / before[0]

    @property
    def cost(self) -> float | None:
        """Device-seconds of training."""
        return self.seconds_at(self.step)

    def schedule(self) -> tuple[str, list[tuple[int, float]]] | None:
        """Name and curve of its method's schedule over the steps k of K, through what changed in mid-run; None where it has none."""
        experiment, steps = self.trial.experiment, self.trial.experiment.training.steps
        at = sorted({round(steps * place / CURVE_POINTS) for place in range(CURVE_POINTS + 1)})
        began = [0, *(change.after for change in experiment.training.changes)]
        objectives = [experiment.at(after + 1).objective for after in began]
        used = [(step, objectives[bisect.bisect_right(began, step) - 1]) for step in at]
        if isinstance(experiment.objective, SoFlow):
            return "r(k, K)", [(step, objective.schedule.ratio(step, steps)) for step, objective in used]
        if isinstance(experiment.objective, AlphaFlow):
            return "alpha(k, K)", [(step, objective.schedule.alpha(step, steps)) for step, objective in used]
        return None


@dataclass(frozen=True)
class SweepReport:
    """Everything that the report shows."""

    record: SweepRecord
    experiment: Experiment
    state: str
    trials: list[ReportedTrial]
    ranked: list[RankedPoint]
    """Points of the search, best first; those of `search.final` before the others."""
    environment: dict[str, str]
    base_file: str
    """Name of the file, beside the report, that the commands of the trials start from."""
    notes: list[str] = field(default_factory=list)

    @property
    def metric(self) -> str:
        return self.record.metric

    @property
    def devices(self) -> str:
        """`GPU` or `CPU`: what the seconds are those of."""
        return "GPU" if self.experiment.resources.gpus_per_worker else "CPU"

    @property
    def scored(self) -> list[ReportedTrial]:
        """The trials with a value of the metric, best value first."""
        sign = 1 if self.record.mode == "min" else -1
        scored = [trial for trial in self.trials if trial.best is not None and not trial.failure]
        return sorted(scored, key=lambda trial: sign * self.value(trial))

    @property
    def winner(self) -> str | None:
        """Name of the best trial of the best point."""
        return self.ranked[0].trials[0].name if self.ranked and self.ranked[0].values else None

    def gaps(self) -> list[Gap | None]:
        """Of each of `ranked` to the best point of its phase, which is `search.final` or the search before it."""
        phases = [self.of(point.trials[0].name).trial.phase == "final" for point in self.ranked]
        finals = phases.count(True)
        return gaps_to_best(self.ranked[:finals]) + gaps_to_best(self.ranked[finals:])

    def value(self, trial: ReportedTrial) -> float:
        """Its best value of the metric; NaN where it has none."""
        return trial.best.metrics[self.metric] if trial.best is not None and not trial.failure else math.nan

    def of(self, name: str) -> ReportedTrial:
        """The trial of a name."""
        return next(trial for trial in self.trials if trial.name == name)

    @property
    def cost(self) -> float | None:
        """Device-seconds of all trials; None where none is known."""
        known = [trial.cost for trial in self.trials if trial.cost is not None]
        return sum(known) if known else None

    def varied(self) -> dict[str, list[Any]]:
        """The settings that differ between trials, each with its value in every trial; None where a trial does not have it."""
        keys = dict.fromkeys(
            key for trial in self.trials for key in trial.trial.settings if key not in ("seed", "budget")
        )
        # What a section holds is shown by its method, or else as text.
        columns = {
            key: [_value(self.record.experiment, trial.trial.settings, key) for trial in self.trials]
            for key in keys
        }
        return {
            key: values
            for key, values in columns.items()
            if len({json.dumps(v, default=str) for v in values}) > 1
        }


def gather(record: SweepRecord, project: ProjectFolder, store: TrackingStore, base_file: str) -> SweepReport:
    """Read what the report of a sweep shows. Where the tracking store does not answer, a note says what is missing."""
    experiment = Experiment(**record.experiment)
    notes: list[str] = []
    speeds: dict[str, list[tuple[int, float]]] = {}
    environment: dict[str, str] = {}
    try:
        if store.exists() and record.run and record.experiment_id:
            environment = _environment(store, record.run)
            speeds = _step_seconds(Tracking(store, record.experiment_id), record.run)
    except Exception as error:
        notes.append(
            f"The tracking store {store.uri} could not be read ({summarize(error)[:200]}): the environment is missing, and costs are "
            "estimated from the last speed of each trial."
        )
    states = {
        report.trial: report
        for report in trial_reports(project, record, [trial.name for trial in record.trials])
    }
    trials = []
    for trial in trials_of_record(record):
        seconds = _device_seconds(trial.experiment, speeds.get(trial.name, []))
        own = _read_trial(record, project, trial, base_file, seconds)
        trials.append(_with_state(own, str(states[trial.name].state), states[trial.name].step))
    scored = [
        ScoredTrial(
            t.name, t.trial.settings, t.best.metrics[record.metric] if t.best and not t.failure else None
        )
        for t in trials
    ]
    final = {t.name for t in trials if t.trial.phase == "final"}
    ranked = [
        point
        for group in ([s for s in scored if s.name in final], [s for s in scored if s.name not in final])
        for point in ranked_points(group, record.mode)
    ]
    state = str(sweep_state(project, record))
    return SweepReport(record, experiment, state, trials, ranked, environment, base_file, notes)


def _read_trial(
    record: SweepRecord,
    project: ProjectFolder,
    trial: Trial,
    base_file: str,
    seconds: list[tuple[int, float]],
) -> ReportedTrial:
    published = record.checkpoints(project, trial.name).published()
    state = published[-1].state if published else None
    evaluations = state.evaluations if state else []
    best = best_evaluation(evaluations, record.metric, record.mode)
    folder = project.trial(record.id, trial.name)
    status = read_status(folder)
    step = state.step if state else 0
    if not seconds and status is not None and status.images and status.images_per_second and step:
        seconds = _device_seconds(
            trial.experiment, [(step, trial.experiment.training.batch / status.images_per_second)]
        )
    grids = sorted((folder / "samples").glob(f"*-step-{best['step']:08d}.png")) if best else []
    return ReportedTrial(
        trial=trial,
        state="",
        step=step,
        failure=status.failure if status else None,
        evaluations=evaluations,
        best=ScoredStep.of(best) if best else None,
        seconds=seconds,
        grids=grids,
        command=_command(record, trial, base_file),
    )


def _with_state(trial: ReportedTrial, state: str, step: int) -> ReportedTrial:
    return ReportedTrial(**{**vars(trial), "state": state, "step": max(step, trial.step)})


def _command(record: SweepRecord, trial: Trial, base_file: str) -> str:
    """The command that trains a trial anew, as a sweep of its own; one of a population through all that its lineage went through."""
    settings = {key: value for key, value in trial.settings.items() if key != "budget"}
    if record.rungs:
        history = record.history(trial.name)
        later = changes(history)
        settings = {**history[0].settings, **({"training.changes": later} if later else {})}
    if trial.experiment.training.steps != record.experiment["training"]["steps"]:
        settings["training.steps"] = trial.experiment.training.steps
    number = trial.name.split("-")[1] if "-" in trial.name else str(trial.index)
    name = f"{record.name[:48]}-trial-{number}"
    sets = [f"--set name={name}"]
    sets += [f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in settings.items()]
    return " ".join(["soflowctl run", shlex.quote(base_file), *sets])


def base_settings(record: SweepRecord) -> dict[str, Any]:
    """The settings of a sweep without its search space, of which the trials' commands start."""
    settings = json.loads(json.dumps(record.experiment))
    search = settings.get("search", {})
    settings["search"] = {key: search[key] for key in ("metric", "mode") if key in search}
    # A trial that is trained again is no new candidate.
    settings["registry"] = {**settings.get("registry", {}), "enabled": False}
    return dict(settings)


def _environment(store: TrackingStore, run: str) -> dict[str, str]:
    """Tags of the sweep's run that say on what it ran."""
    tags = store.run_tags(run) or {}
    shown = (
        "host.",
        "data.",
        "network",
        "method",
        "mlflow.source.git.commit",
        "evaluator",
        "eval.",
        "features",
    )
    return {key: value for key, value in sorted(tags.items()) if key.startswith(shown)}


def _step_seconds(tracking: Tracking, parent: str) -> dict[str, list[tuple[int, float]]]:
    """(step, seconds of a step) as they were logged, by trial."""
    found = {}
    for run in tracking.children(parent):
        points = tracking.client.get_metric_history(run.info.run_id, STEP_SECONDS)
        found[run.data.tags.get(TRIAL_TAG, "")] = sorted((point.step, point.value) for point in points)
    return found


def _device_seconds(experiment: Experiment, speeds: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Cumulative seconds of all devices of a trial from the seconds of its steps."""
    resources = experiment.resources
    devices = resources.workers * (resources.gpus_per_worker or resources.cpus_per_worker)
    total, before, curve = 0.0, 0, []
    for step, seconds in speeds:
        if step > before and math.isfinite(seconds):
            total += devices * seconds * (step - before)
            before = step
            curve.append((step, total))
    return curve


def _value(file: Mapping[str, Any], point: Mapping[str, Any], key: str) -> Any:
    """A setting of a trial; of a section its method, with what is in it where the point has it and not the file."""
    try:
        value = PointSettings(file, point)(key)
    except KeyError:
        return None
    if isinstance(value, Mapping):
        if key not in point and "method" in value:
            return value["method"]
        inside = flatten(dict(value))
        method = inside.pop("method", None)
        rest = ", ".join(f"{name.rsplit('.', 1)[-1]} {each}" for name, each in inside.items())
        return f"{method} ({rest})" if method and rest else method or rest
    return value
