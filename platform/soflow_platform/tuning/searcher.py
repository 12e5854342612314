"""Tune's search algorithm over the trials of a sweep: first those that it has, then those that are drawn from results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from soflow_platform.tuning.drawing import DrawnTrials
from soflow_platform.tuning.search_space import Trial
from soflow_platform.tuning.trial import TrialTask


class SweepSearcher(Searcher):
    """Hands trials to Tune. Its memory is the record of the sweep, so that it saves nothing of its own."""

    def __init__(
        self,
        tasks: list[TrialTask],
        drawn: DrawnTrials,
        task_of: Callable[[Trial], TrialTask],
        metric: str,
        mode: str,
    ) -> None:
        """`tasks` are those of the trials that the sweep has; those that are drawn are appended to it."""
        super().__init__(metric=metric, mode=mode)
        self._tasks, self._drawn, self._task_of = tasks, drawn, task_of
        self._handed = 0
        self._names: dict[str, str] = {}

    @property
    def samples(self) -> int:
        """Trials that it has, and will have."""
        return len(self._tasks) + self._drawn.left

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if self._handed == len(self._tasks):
            if self._drawn.left == 0:
                return str(Searcher.FINISHED)
            self._tasks.append(self._task_of(self._drawn.draw()))
        task = self._tasks[self._handed]
        self._handed += 1
        self._names[trial_id] = task.job.trial
        return {"task": task.as_config()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._report(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        del error
        self._report(trial_id, result)
        self._drawn.end(self._names[trial_id])

    def _report(self, trial_id: str, result: dict[str, Any] | None) -> None:
        if result and self.metric in result:
            scores = {key: value for key, value in result.items() if key == "step" or key.startswith("eval/")}
            self._drawn.report(self._names[trial_id], scores)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its search algorithm to restore it, and a sweep that goes on makes another one."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SweepSearcher:
        return self

    def save(self, checkpoint_path: str) -> None:
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """There is nothing to restore: a sweep that goes on makes another one."""
