"""Prometheus metrics of a sweep's trials, which Ray exports beside its own on each node's metrics port."""

from __future__ import annotations

from soflow_platform.training.trial_status import TrialState, TrialStatus

GAUGES = {
    "step": "Finished optimizer steps.",
    "images_per_second": "Samples trained per second; 0 while a trial does not train.",
    "loss": "Training loss as last logged.",
    "eta_seconds": "Estimated seconds to the last step.",
}
"""Fields of a trial's status; Ray exports each as `ray_soflow_FIELD`."""
RESTARTS = "restarts"
"""Exported as `ray_soflow_restarts_total`."""
TAGS = ("sweep", "trial")


class TrialGauges:
    """Gauges of the trials of one sweep, in the process of an actor."""

    def __init__(self, sweep: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._sweep = sweep
        self._gauges = {name: Gauge(f"soflow_{name}", text, tag_keys=TAGS) for name, text in GAUGES.items()}
        text = "How often a trial's workers were lost and started again."
        self._restarts = Counter(f"soflow_{RESTARTS}", text, tag_keys=TAGS)

    def set(self, trial: str, before: TrialStatus, status: TrialStatus) -> None:
        """Take over a trial's new status."""
        tags = {"sweep": self._sweep, "trial": trial}
        for name, gauge in self._gauges.items():
            value = getattr(status, name)
            if name == "images_per_second" and status.state is not TrialState.RUNNING:
                value = 0.0
            if value is not None:
                gauge.set(float(value), tags=tags)
        if status.state is TrialState.RESTARTING and before.state is not TrialState.RESTARTING:
            self._restarts.inc(1.0, tags=tags)
