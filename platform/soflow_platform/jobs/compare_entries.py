"""Entries of a comparison, each a trained network sampled in one way, and the rows that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from soflow_platform.jobs.compare_rows import Row
from soflow_platform.jobs.evaluate import Score
from soflow_platform.jobs.model_under_test import ModelUnderTest, SampleSettings
from soflow_platform.jobs.targets import EvaluationTarget
from soflow_platform.tuning.search_space import Trial


@dataclass(frozen=True)
class Cost:
    """Cost of training a method and of sampling it in one way."""

    step_seconds: float
    peak_bytes: float
    image_seconds: float
    speedup: float


@dataclass(frozen=True)
class Entry:
    """A trained network and one way to sample it, with its score and its cost once they are known."""

    trial: Trial
    target: EvaluationTarget
    network: ModelUnderTest
    samples: SampleSettings
    score: Score | None = None
    cost: Cost | None = None
    sweep: str | None = None
    """Its sweep, where several are compared."""
    unequal: str | None = None
    """Why its budget is not that of the first sweep."""

    @property
    def name(self) -> str:
        """The trial, with its sweep where several are compared."""
        return self.trial.name if self.sweep is None else f"{self.sweep}/{self.trial.name}"

    @property
    def other_labels(self) -> bool:
        """Whether labels are chosen in another way than in the sweep's own evaluations."""
        return self.samples.labels != self.trial.experiment.evaluation.labels

    @property
    def work(self) -> int:
        """Function evaluations of all samples."""
        return self.network.nfe(self.samples.steps) * self.samples.count


def rows_of(entries: Sequence[Entry]) -> list[Row]:
    """A row for each entry and each budget of its trial, budget by budget."""
    budgets = dict.fromkeys(budget for entry in entries for budget in entry.trial.budgets)
    return [_row(budget, entry) for budget in budgets for entry in entries if budget in entry.trial.budgets]


def _row(budget: str, entry: Entry) -> Row:
    score, objective = entry.score, entry.network.objective
    assert score is not None
    others = dict(score.values)
    distance = next(others.pop(name) for name in ("fid", "fd") if name in others)
    row = Row(
        budget=budget,
        trial=entry.name,
        method=objective.method,
        uses_jvp=objective.uses_jvp,
        trained_steps=entry.target.step or 0,
        trained_guidance=objective.trained_guidance,
        sampling=_sampling(score.tags, entry.other_labels),
        steps=entry.samples.steps,
        nfe=int(score.tags["nfe"]),
        samples=entry.samples.count,
        distance=distance,
        label_agreement=others.pop("label_agreement", None),
        others=others,
        flags=tuple(_flags(entry, score)),
        point=_point(entry.trial),
        seed=entry.trial.experiment.seed,
        labels=entry.samples.labels if entry.other_labels else None,
        varied=_varied(entry.trial),
    )
    return row if entry.cost is None else replace(row, **vars(entry.cost))


def _varied(trial: Trial) -> str:
    """The settings of its point but for method, seed and budget: `optimizer.lr 0.001`."""
    own = {key: value for key, value in trial.settings.items() if key not in ("objective", "seed", "budget")}
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in own.items()
    )


def _point(trial: Trial) -> str:
    """Equal for trials of one phase of the search that differ in their seed alone.

    Those of `search.final` are apart: the seeds by which a point was chosen flatter it.
    """
    return f"{trial.phase} {trial.experiment.model_copy(update={'seed': 0}).training_digest()}"


def _flags(entry: Entry, score: Score) -> list[str]:
    """Reasons, as sentences, why a row cannot be compared with the others."""
    flags = [*score.flags, *([entry.unequal] if entry.unequal else [])]
    experiment, done = entry.trial.experiment, entry.target.step or 0
    if done < experiment.training.steps:
        flags.append(
            f"{entry.trial.name} is at step {done} of {experiment.training.steps}: it has not had its budget."
        )
    if entry.samples.count != experiment.evaluation.samples:
        way = f"{entry.network.objective.method} ({_sampling(score.tags, entry.other_labels)})"
        flags.append(
            f"{way} is scored on {entry.samples.count} samples, where {experiment.evaluation.samples} are usual: fewer give a larger "
            "distance."
        )
    return flags


def _sampling(tags: dict[str, str], other_labels: bool) -> str:
    """Sampler, guidance, times and grid: `euler, guidance 3`, `consistency, times 0.55`; and labels that are not the sweep's."""
    scale = float(tags.get("sampling_scale", "1"))
    parts = [tags["sampler"]] if "sampler" in tags else []
    parts += [f"guidance {scale:g}"] if scale != 1 else []
    parts += [f"interval {tags['sampling_interval']}"] if "sampling_interval" in tags else []
    parts += [f"times {tags['sampling_times']}"] if "sampling_times" in tags else []
    parts += [f"grid {tags['sampling_grid']}"] if "sampling_grid" in tags else []
    parts += [f"{tags['labels']} labels"] if other_labels else []
    return ", ".join(parts)
