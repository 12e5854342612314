"""What a sweep shows while it runs, and how its trials ended."""

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
    """How one trial ended."""

    name: str
    status: TrialStatus
    """`state` is FINISHED, PRUNED, STOPPED or FAILED."""
    best: ScoredStep | None
    """The evaluation with the best value of the search metric."""


class Display:
    """Receives the events of a sweep; this one shows nothing."""

    def start(self, record: SweepRecord, cluster: Cluster, actor: Any) -> None:
        """Trials begin; `actor` is the sweep's progress actor."""

    def stop(self) -> None:
        """Trials have ended."""

    def say(self, text: str) -> None:
        """One line about what is being done."""

    @contextlib.contextmanager
    def describing(self) -> Iterator[Report]:
        """Statistics of the reference images are computed for the length of a block; the report gets their progress."""
        yield no_report
