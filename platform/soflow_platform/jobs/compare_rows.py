"""Rows of a comparison: a trial sampled in one way, and the mean of the trials that differ in their seed alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from soflow_platform.tuning.seed_statistics import SeedMean, differing


@dataclass(frozen=True)
class Row:
    """One trial, or the mean of those that differ in their seed alone, sampled in one way."""

    budget: str
    """What all rows of its table have in common: optimizer steps (`steps`) or network evaluations (`evaluations`)."""
    trial: str
    method: str
    uses_jvp: bool
    trained_steps: int
    sampling: str
    """Sampler, guidance and times, as `ddim` or `euler, guidance 3`; empty where none of them is set."""
    steps: int
    nfe: int
    samples: int
    distance: float
    label_agreement: float | None
    step_seconds: float | None = None
    peak_bytes: float | None = None
    image_seconds: float | None = None
    speedup: float | None = None
    """Over DDPM of 1000 steps, in time for one image."""
    trained_guidance: float | None = None
    """Scale of the guidance in training, 1 for none; None where the method has no such setting."""
    others: Mapping[str, float] = field(default_factory=dict)
    """Other metrics of the sweep's evaluations, by name."""
    flags: tuple[str, ...] = ()
    point: str = ""
    """Equal for trials that differ in their seed alone; empty where every trial stands for itself."""
    seeds: int = 1
    """Trials that the numbers are means of."""
    spread: float | None = None
    """Standard deviation of `distance` over the seeds; None of one seed."""
    seed: int | None = None
    """Of the trial; None of the mean of several."""
    by_seed: Mapping[int, float] = field(default_factory=dict)
    """The distances of which `distance` is the mean, by the seeds of their trials; empty of one trial."""
    labels: str | None = None
    """How labels were chosen, where that is not the sweep's way."""
    varied: str = ""
    """Settings of the trial's point in the search, but for method and seed: `optimizer.lr 0.001`."""

    def label(self, rows: Sequence[Row]) -> str:
        """The method's name; with its guidance or its trial's name where `rows` hold other trainings of the same method."""
        same_method = [row for row in rows if row.method == self.method]
        if len({row.trial for row in same_method}) == 1:
            return self.method
        same_guidance = {row.trial for row in same_method if row.trained_guidance == self.trained_guidance}
        if len(same_guidance) > 1:
            return self.trial
        unguided = self.trained_guidance in (None, 1)
        return f"{self.method}, {'no guidance' if unguided else f'guidance {self.trained_guidance:g}'}"


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, with the settings they have in common."""

    sweep: str
    distance: str
    """Name of the distance: `fid`, `fd`, ..."""
    rows: list[Row]
    settings: dict[str, str]
    """Settings of every score: features, reference, labels, seed."""
    device: str | None
    """Device that the costs were measured on; None where they were not."""
    left_out: list[str] = field(default_factory=list)
    """Trials that could not be compared, and why."""

    @property
    def others(self) -> list[str]:
        """Names of the metrics beside distance and label agreement."""
        return list(dict.fromkeys(name for row in self.rows for name in row.others))

    @property
    def budgets(self) -> list[str]:
        """The budgets in the order of the sweep."""
        return list(dict.fromkeys(row.budget for row in self.rows))

    def of(self, budget: str) -> list[Row]:
        """The rows of one budget, each the mean over the seeds of its point."""
        return over_seeds([row for row in self.rows if row.budget == budget])


def over_seeds(rows: Sequence[Row]) -> list[Row]:
    """One row for the trials that differ in their seed alone and are sampled in the same way: means, and the distance's spread."""
    groups: dict[tuple[str, str, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.point or row.trial, row.sampling, row.steps, row.samples), []).append(row)
    return [_mean(group) for group in groups.values()]


def _mean(rows: Sequence[Row]) -> Row:
    """The mean of rows of one point; a row by itself is as it was."""
    first = rows[0]
    if len(rows) == 1:
        return first
    agreements = [row.label_agreement for row in rows if row.label_agreement is not None]
    names = [name for name in first.others if all(name in row.others for row in rows)]
    by_seed = {row.seed: row.distance for row in rows if row.seed is not None}
    apart = len(by_seed) == len(rows)
    distance = SeedMean.of(by_seed if apart else [row.distance for row in rows])
    return replace(
        first,
        trial=re.sub(r"[-_ ]?\bseed=\d+", "", first.trial),
        distance=distance.mean,
        spread=distance.std,
        seed=None,
        by_seed=distance.by_seed,
        seeds=len(rows),
        label_agreement=SeedMean.of(agreements).mean if len(agreements) == len(rows) else None,
        others={name: SeedMean.of([row.others[name] for row in rows]).mean for name in names},
        flags=tuple(dict.fromkeys(flag for row in rows for flag in row.flags)),
    )


def decided_orders(rows: Sequence[Row]) -> dict[tuple[int, int], bool]:
    """Whether the order of two of the rows is decided, by their places i < j; pairs of which one has a single seed are left out."""
    return differing([SeedMean(row.distance, row.spread, row.seeds, row.by_seed) for row in rows])
