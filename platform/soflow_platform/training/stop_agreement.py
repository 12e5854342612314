"""The stop or the checkpoint that rank 0 was asked for, agreed by all ranks after a step."""

from __future__ import annotations

from soflow_platform.training import distributed
from soflow_platform.training.setup import TrialSetup
from soflow_platform.training.trial_io import TrialIO


class ShouldStop:
    """Whether training should stop after the step: a collective call with the same answer on every rank.

    Raises JobError on every rank where rank 0 can no longer log metrics.
    """

    FAILS, STOPS, SAVES = 3, 2, 1
    """What ranks agree on: the largest number of any of them."""

    def __init__(self, setup: TrialSetup, io: TrialIO) -> None:
        self.setup, self.io = setup, io
        self.save_requested = False
        """Whether a checkpoint is asked for, on every rank; set here, and taken back by who saves."""

    def __call__(self) -> bool:
        failure, step = self.io.failure, self.setup.train_step.step
        stops = self.io.stop_requested(step)
        agreed = self.FAILS if failure else self.STOPS if stops else self.SAVES * self.io.save_requested(step)
        if self.setup.world > 1:
            agreed = int(distributed.all_reduce_max(agreed, self.setup.device))
            failure = distributed.broadcast_object(failure) if agreed == self.FAILS else None
        if failure is not None:
            raise failure
        self.save_requested = self.save_requested or agreed == self.SAVES
        return agreed == self.STOPS
