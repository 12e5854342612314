"""What the trials of a population went through (`search.pbt`): decisions at rungs, and the settings of each interval of steps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MISSING = object()


@dataclass(frozen=True)
class Replacement:
    """A trial that goes on from another one's checkpoint, with other settings."""

    trial: str
    source: str
    """The trial whose weights, averages and optimizer state it takes."""
    before: dict[str, Any]
    """Its own settings until here, by their paths."""
    after: dict[str, Any]
    """Those with which it goes on, moved from the source's."""


@dataclass(frozen=True)
class Rung:
    """What was decided when the trials had reached a step."""

    step: int
    scores: dict[str, Any]
    """Value of the metric by trial; None for one that is NaN. Trials that are not named had failed or ended."""
    replaced: list[Replacement] = field(default_factory=list)

    def replacement(self, trial: str) -> Replacement | None:
        """What became of a trial here; None where it went on as it was."""
        return next((each for each in self.replaced if each.trial == trial), None)


@dataclass(frozen=True)
class Interval:
    """Steps that were trained with the same settings."""

    trial: str
    """The trial that trained them."""
    after: int
    """The step before the first of them."""
    settings: dict[str, Any]


def intervals(points: Mapping[str, Mapping[str, Any]], rungs: Sequence[Rung], trial: str) -> list[Interval]:
    """The settings that led to a trial's weights, from the first step on, those of its ancestors included.

    `points` are the settings with which each trial began.
    """
    for place in reversed(range(len(rungs))):
        replacement = rungs[place].replacement(trial)
        if replacement is not None:
            before = intervals(points, rungs[:place], replacement.source)
            return [*before, Interval(trial, rungs[place].step, dict(replacement.after))]
    return [Interval(trial, 0, dict(points[trial]))]


def changes(history: Sequence[Interval]) -> list[dict[str, Any]]:
    """The same as `training.changes` after the first interval, each with the settings that differ from those before."""
    found = []
    for before, interval in itertools.pairwise(history):
        differing = {
            key: value for key, value in interval.settings.items() if before.settings.get(key) != value
        }
        if differing:
            found.append({"after": interval.after, "settings": differing})
    return found


def describe(history: Sequence[Interval], steps: int) -> str:
    """`1-200 trial-01 (lr=0.001); 201-600 trial-00 (lr=0.0012)`: which trial trained which steps, with which settings."""
    ends = [*(interval.after for interval in history[1:]), steps]
    return "; ".join(
        f"{interval.after + 1}-{end} {short_name(interval.trial)} ({describe_settings(interval.settings)})"
        for interval, end in zip(history, ends, strict=True)
    )


def describe_settings(settings: Mapping[str, Any]) -> str:
    """`weight_power=1, lr=0.0012`."""
    return ", ".join(f"{key.rsplit('.', 1)[-1]}={_shown(value)}" for key, value in settings.items())


def short_name(trial: str) -> str:
    """`trial-03` of `trial-03-weight_power=1`."""
    return "-".join(trial.split("-")[:2])


def values_at(settings: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The values of settings by their paths, from nested dictionaries; those that are not there are left out."""
    found: dict[str, Any] = {}
    for key in keys:
        value: Any = settings
        for part in key.split("."):
            value = value.get(part, MISSING) if isinstance(value, Mapping) else MISSING
        if value is not MISSING:
            found[key] = value
    return found


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
