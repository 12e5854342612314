"""Progress actor: the latest status of every trial of a running sweep, written by workers and read by the terminal."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from soflow_platform.training.trial_status import TrialState, TrialStatus, progress_actor_name
from soflow_platform.tuning.trial_gauges import TrialGauges

STATES_OF_WORKERS = (TrialState.RUNNING, TrialState.EVALUATING, TrialState.STOPPING, TrialState.RESTARTING)


class ProgressActor:
    """Latest status of each trial, and its evaluations in order, so that a trial's driver can report each to Tune once."""

    def __init__(self, exported: str | None = None) -> None:
        """`exported` names the sweep whose trials' metrics Ray is to export; None exports none."""
        self._gauges = TrialGauges(exported) if exported else None
        self._statuses: dict[str, TrialStatus] = {}
        self._evaluations: dict[str, list[dict[str, Any]]] = {}

    def update(self, trial: str, changes: dict[str, Any]) -> None:
        """Set fields of one trial's status."""
        before = self.progress(trial)
        if before.state is TrialState.FAILED and changes.get("state") in STATES_OF_WORKERS:
            # Sent by another worker before it knew; a new attempt begins with STARTING.
            return
        if changes.get("state") == TrialState.RUNNING:
            # The trial trains again, so that a failure of an earlier attempt no longer holds.
            changes = {"failure": None, **changes}
            if before.state.without_workers:
                # What it waited for is there.
                changes = {"trouble": None, **changes}
        if changes.get("state") == TrialState.STARTING:
            changes = {"trouble": None, **changes}
        if changes.get("state", before.state) != before.state:
            changes = {**changes, "since": time.time()}
        self._statuses[trial] = replace(before, **changes)
        if self._gauges is not None:
            self._gauges.set(trial, before, self._statuses[trial])

    def add_evaluation(self, trial: str, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation; after a restart the same step may come again and is recorded once."""
        recorded = self._evaluations.setdefault(trial, [])
        if not recorded or recorded[-1]["step"] < step:
            recorded.append({"step": step, **metrics})
        self.update(trial, {"metrics": metrics, "scored_step": step})

    def evaluations(self, trial: str, after: int) -> list[dict[str, Any]]:
        """Evaluations of steps beyond `after`."""
        return [e for e in self._evaluations.get(trial, []) if e["step"] > after]

    def progress(self, trial: str) -> TrialStatus:
        """One trial's status."""
        return self._statuses.get(trial, TrialStatus())

    def snapshot(self) -> dict[str, TrialStatus]:
        """Every trial's status."""
        return dict(self._statuses)


def start_progress_actor(sweep: str, exported: bool = False) -> Any:
    """Start the sweep's progress actor on this driver's node, and return its handle; with `exported` it exports metrics of the trials.

    The actor restarts empty where its process dies; trials send their state again within seconds.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return (
        ray.remote(ProgressActor)
        .options(
            name=progress_actor_name(sweep),
            num_cpus=0,
            scheduling_strategy=this_node,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(sweep if exported else None)
    )
