"""Interface through which a sweep reports its events to the terminal, and the outcome of a trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from soflow_platform.cluster.actor_pool import Report, no_report
from soflow_platform.training.trial_status import TrialStatus

if TYPE_CHECKING:
    from soflow_platform.cluster.connection import Cluster
    from soflow_platform.tuning.record import ScoredStep, SweepRecord


@dataclass(frozen=True)
class TrialOutcome:
    """Final state of a trial, with its failure and its best evaluation."""

    name: str
    status: TrialStatus
    """`state` is FINISHED, PRUNED, STOPPED or FAILED."""
    best: ScoredStep | None
    """The evaluation with the best value of the search metric."""


class Display:
    """Receives the events of a sweep. The base class shows nothing."""

    def start(self, record: SweepRecord, cluster: Cluster, actor: Any) -> None:
        """Trials begin; `actor` is the sweep's progress actor."""

    def stop(self) -> None:
        """Trials have ended."""

    def say(self, text: str) -> None:
        """Show one line about the work in progress."""

    @contextlib.contextmanager
    def describing(self) -> Iterator[Report]:
        """Context in which the statistics of reference images are computed; it yields a function that takes their progress."""
        yield no_report
