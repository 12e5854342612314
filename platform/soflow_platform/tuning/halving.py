"""Tune's scheduler of asynchronous successive halving (`search.asha`), which ends trials whose metric is NaN."""

from __future__ import annotations

import math
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from soflow_platform.config.search import AshaConfig
from soflow_platform.tuning.trial import RUNG_STEP


class Halving(ASHAScheduler):
    """Ends trials whose metric is NaN at a rung. Ray would let them train to their end, for NaN is below no value."""

    def __init__(self, asha: AshaConfig, steps: int, metric: str) -> None:
        """`steps` are those of the sweep's own settings; `metric` is what Tune is told as well."""
        super().__init__(
            time_attr=RUNG_STEP,
            max_t=steps,
            grace_period=asha.first_rung,
            reduction_factor=asha.reduction,
        )
        self._compared = metric
        self._steps = [asha.first_rung]
        while self._steps[-1] * asha.reduction < steps:
            self._steps.append(self._steps[-1] * asha.reduction)
        self._reached: dict[str, float] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        before = self._reached.get(trial.trial_id, 0.0)
        step = self._reached[trial.trial_id] = max(before, result.get(RUNG_STEP, 0.0))
        if not self._is_nan(result):
            return str(super().on_trial_result(tune_controller, trial, result))
        at_rung = any(before < rung <= step for rung in self._steps)
        return str(TrialScheduler.STOP if at_rung else TrialScheduler.CONTINUE)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        # NaN is nothing to compare others with.
        super().on_trial_complete(tune_controller, trial, {} if self._is_nan(result) else result)

    def _is_nan(self, result: dict[str, Any]) -> bool:
        return math.isnan(result.get(self._compared, 0.0))
