"""Interface of a metric, and the metrics by name.

A metric is one class: what it accumulates over a set of images, and its value from that. `named.py` has those of the platform; one of a
plugin is registered in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch

from soflow_core.registration import Registry
from soflow_pipelines.features.network import FeatureNetwork
from soflow_pipelines.metrics.accumulators import Accumulator, ScoreError

T = TypeVar("T")


@dataclass(frozen=True)
class Sides:
    """What a score is taken of: accumulated generated images, and real ones."""

    generated: Accumulator
    """The metric's own accumulator, of the generated images."""
    count: int
    """Number of generated images."""
    reference: Any
    """`Reference` of the real images; None for a metric that compares with none."""
    device: torch.device
    """Where large distances are computed."""
    shared: dict[str, Any] = field(default_factory=dict)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """A result that several metrics of one score share, computed by the first that asks."""
        if name not in self.shared:
            self.shared[name] = compute()
        return cast(T, self.shared[name])


@dataclass(frozen=True)
class MetricValue:
    """A metric's value, with what must be known of it."""

    value: float
    spread: float | None = None
    """Standard deviation over parts of the images, where the metric is a mean over such."""
    flags: tuple[str, ...] = ()
    """Sentences: why the number is not comparable with others of its name."""


class Metric(ABC):
    """A score of a set of images: a frozen dataclass without settings.

    `score` is a function of what was accumulated: neither the order of the images nor their split over workers may matter. It raises
    ScoreError, in one sentence, where a number would not be what its name says.
    """

    name: str
    """Given by `@register`."""
    better: ClassVar[Literal["min", "max"]]
    accumulator: ClassVar[type[Accumulator]]
    compares: ClassVar[bool] = True
    """Whether it is taken against a reference, of which the same is accumulated."""
    any_features: ClassVar[bool] = False
    """Whether it can be taken on every feature network; otherwise on those that name it among their `metrics`."""

    @classmethod
    def registration_fault(cls, part: type[Metric]) -> str | None:
        """What is wrong with a registered metric; None where nothing is."""
        lacking = [name for name in ("better", "accumulator") if not hasattr(part, name)]
        return f"does not say its {' and '.join(lacking)}" if lacking else None

    @abstractmethod
    def score(self, sides: Sides) -> MetricValue:
        """The value of complete statistics of at least two images."""


METRICS: Registry[Metric] = Registry("metric", Metric, "name")  # type: ignore[type-abstract]


def select_metrics(names: Iterable[str], network: FeatureNetwork) -> tuple[str, ...]:
    """The metrics of these names, in the registry's order.

    Raises ScoreError for a name that is no metric, for a metric that the network cannot give, and where there is none.
    """
    requested = set(names)
    unknown = sorted(name for name in requested if name not in METRICS)
    if unknown:
        raise ScoreError(f"there is no metric {unknown[0]!r}; there are {', '.join(METRICS)}.")
    possible = {name for name in METRICS if METRICS[name].any_features or name in network.metrics}
    missing = sorted(requested - possible)
    if missing:
        able = ", ".join(name for name in METRICS if name in possible)
        raise ScoreError(
            f"{missing[0]} cannot be measured on the features {network.id}; on them there are {able}."
        )
    if not requested:
        raise ScoreError("there is no metric to measure.")
    return tuple(name for name in METRICS if name in requested)


def accumulators_of(metrics: Iterable[str]) -> tuple[type[Accumulator], ...]:
    """The accumulators that these metrics need, each once, in the order of the metrics: that of their arrays in a state file."""
    chosen = set(metrics)
    return tuple(dict.fromkeys(METRICS[name].accumulator for name in METRICS if name in chosen))
