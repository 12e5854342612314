"""soflow_platform.tuning.display"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from soflow_platform.cluster.connection import Cluster
from soflow_platform.evaluation.runner import Report, silent
from soflow_platform.tuning.record import SweepRecord


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial ended. `state`: finished, stopped (by the scheduler), asked to stop, or failed."""

    name: str
    state: str
    step: int
    best: dict[str, Any] | None
    """The evaluation with the best value of the search metric."""
    failure: str | None = None


class Display:
    """What a sweep tells its watcher; this one is silent."""

    def start(self, record: SweepRecord, cluster: Cluster, board: Any) -> None:
        """Trials begin."""

    def stop(self) -> None:
        """Trials have ended."""

    def say(self, text: str) -> None:
        """One line about what is being done."""

    @contextlib.contextmanager
    def describing(self) -> Iterator[Report]:
        """The real images are described; the report says how many are."""
        yield silent
