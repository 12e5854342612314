"""What the trials of a running sweep last said: one small Ray actor that workers write to and the terminal reads."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class TrialProgress:
    """One trial: finished steps, throughput, the latest evaluation, and what it is doing."""

    step: int = 0
    images_per_second: float = 0.0
    loss: float | None = None
    eta_seconds: float | None = None
    """To the last step, at the pace so far."""
    state: str = "waiting"
    since: float = 0.0
    """When this state began, in seconds since 1970."""
    lost: str | None = None
    """The workers that were lost last."""
    metrics: dict[str, float] = field(default_factory=dict)
    """The latest evaluation."""
    scored_step: int = 0
    """The step it was made at."""
    failure: str | None = None
    """Why the trial cannot go on, where restarting it would not help."""


class ProgressActor:
    """Lives in an actor. Evaluations are kept in order, so that a trial's driver can hand each to Tune once."""

    def __init__(self) -> None:
        self._progress: dict[str, TrialProgress] = {}
        self._evaluations: dict[str, list[dict[str, Any]]] = {}

    def update(self, trial: str, changes: dict[str, Any]) -> None:
        """Set fields of one trial's progress."""
        before = self._progress.get(trial, TrialProgress())
        if changes.get("state") == "running":
            # It goes on, whatever was said before.
            changes = {"failure": None, **changes}
        if changes.get("state", before.state) != before.state:
            changes = {**changes, "since": time.time()}
        self._progress[trial] = replace(before, **changes)

    def add_evaluation(self, trial: str, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation; one of a step that is already there is the same one again after a restart."""
        known = self._evaluations.setdefault(trial, [])
        if not known or known[-1]["step"] < step:
            known.append({"step": step, **metrics})
        self.update(trial, {"metrics": metrics, "scored_step": step})

    def evaluations(self, trial: str, after: int) -> list[dict[str, Any]]:
        """Evaluations of steps beyond `after`."""
        return [e for e in self._evaluations.get(trial, []) if e["step"] > after]

    def progress(self, trial: str) -> TrialProgress:
        """One trial's progress."""
        return self._progress.get(trial, TrialProgress())

    def snapshot(self) -> dict[str, TrialProgress]:
        """Every trial's progress."""
        return dict(self._progress)


def start_progress_actor(name: str) -> Any:
    """Start the sweep's board beside the driver, whose life it shares. Returns its actor handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # Where its process dies it begins anew, and what trials tell next is all that anybody asks of it.
    lasting = {"max_restarts": -1, "max_task_retries": -1}
    return (
        ray.remote(ProgressActor).options(name=name, num_cpus=0, scheduling_strategy=here, **lasting).remote()
    )
