"""Tune's trial actor: a process that trains one trial after the other, or watches their Ray Train runs."""

from __future__ import annotations

from typing import Any

from ray import tune

from soflow_platform.cluster.connection import DRIVER_CPUS
from soflow_platform.config.experiment import Experiment
from soflow_platform.training.launch import release_memory
from soflow_platform.tuning.trial import TrialDriver, TrialTask


class TrialActor(tune.Trainable):
    """Returns a trial's evaluations to Tune, one in each `step`.

    Tune reuses the process for the next trial where the trial has ended, and not where it raised.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What the trial asks Ray for."""
        resources = Experiment(**config["task"]["job"]["experiment"]).resources
        request = {"CPU": DRIVER_CPUS}
        if resources.in_process:
            request = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
        return tune.PlacementGroupFactory([{name: amount for name, amount in request.items() if amount}])

    def setup(self, config: dict[str, Any]) -> None:
        """Begin a trial."""
        self._driver = TrialDriver(TrialTask.of(config["task"]))
        self._evaluations = self._driver.run()
        self._last: dict[str, Any] = {}

    def step(self) -> dict[str, Any]:
        """Train until the next evaluation."""
        evaluation = next(self._evaluations, None)
        if evaluation is None:
            return {**self._last, "done": True}
        self._last = self._driver.result(evaluation)
        return self._last

    def cleanup(self) -> None:
        """End the trial where it stands."""
        self._evaluations.close()
        release_memory()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial."""
        self.cleanup()
        self.setup(new_config)
        return True
