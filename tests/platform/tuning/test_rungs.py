"""Successive halving: Ray's, but for trials whose metric is NaN."""

from __future__ import annotations

import math
from types import SimpleNamespace

from soflow_platform.tuning.ray_tune import _scheduler
from soflow_platform.tuning.trial import RUNG_STEP
from tests.platform.conftest import small_experiment


def test_a_trial_whose_metric_is_nan_is_ended_at_a_rung() -> None:
    """Ray asks whether a value is below those of the others, and NaN is not."""
    experiment = small_experiment("search.asha={first_rung: 2, reduction: 2}")
    metric, mode = experiment.rung_metric
    scheduler = _scheduler(experiment)
    scheduler.set_search_properties(metric, mode)
    good, broken, late = (SimpleNamespace(trial_id=name) for name in ("good", "broken", "late"))

    def decided(trial: SimpleNamespace, step: float, value: float) -> str:
        return str(scheduler.on_trial_result(None, trial, {RUNG_STEP: step, metric: value}))

    for trial in (good, broken, late):
        scheduler.on_trial_add(None, trial)
    assert decided(broken, 1.0, math.nan) == "CONTINUE"
    assert decided(broken, 2.0, math.nan) == "STOP"
    scheduler.on_trial_complete(None, broken, {RUNG_STEP: 2.0, metric: math.nan})
    # The others are compared with each other.
    assert decided(good, 2.0, 5.0) == "CONTINUE"
    assert decided(late, 2.0, 6.0) == "STOP"
    # Rungs are at 2 and 4 of 6 steps; what comes between decides nothing.
    assert decided(good, 3.0, math.nan) == "CONTINUE"
    assert decided(good, 4.5, 1.0) == "CONTINUE"
    assert decided(good, 5.0, math.nan) == "CONTINUE"
