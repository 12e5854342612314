"""The stop or the checkpoint that rank 0 was asked for, agreed by all ranks after a step."""

from __future__ import annotations

from collections import deque

from soflow_platform.training import distributed
from soflow_platform.training.setup import TrialSetup
from soflow_platform.training.trial_io import TrialIO

LAG = 2
"""Steps after which ranks whose GPUs run ahead read what they agreed on: the number is on the host by then, and read at once it would
be waited for behind all that the GPU has still to do.
"""


class ShouldStop:
    """Whether training should stop: collective calls with the same answer on every rank.

    Raises JobError on every rank where rank 0 can no longer log metrics.
    """

    FAILS, STOPS, SAVES = 3, 2, 1
    """What ranks agree on: the largest number of any of them."""

    def __init__(self, setup: TrialSetup, io: TrialIO) -> None:
        self.setup, self.io = setup, io
        self.save_requested = False
        """Whether a checkpoint is asked for, on every rank; set here, and taken back by who saves."""
        self._asked: deque[distributed.PendingMaximum] = deque()

    def after_step(self) -> bool:
        """By what was asked for so far; of several ranks whose GPUs run ahead, by what was asked for `LAG` steps before."""
        setup = self.setup
        if setup.world == 1 or not setup.train_step.runs_ahead:
            return self.now()
        self._asked.append(distributed.PendingMaximum(self._wish(), setup.device))
        return len(self._asked) > LAG and self._act(self._asked.popleft().value())

    def now(self) -> bool:
        """By what was asked for so far, waited for."""
        wish = self._wish()
        if self.setup.world > 1:
            wish = distributed.PendingMaximum(wish, self.setup.device).value()
        return self._act(wish)

    def _wish(self) -> int:
        """This rank's number."""
        step = self.setup.train_step.step
        if self.io.failure is not None:
            return self.FAILS
        if self.io.stop_requested(step):
            return self.STOPS
        return self.SAVES if self.io.save_requested(step) else 0

    def _act(self, agreed: int) -> bool:
        if agreed == self.FAILS:
            failure = self.io.failure
            failure = distributed.broadcast_object(failure) if self.setup.world > 1 else failure
            assert failure is not None, "the rank that has failed has a failure"
            raise failure
        self.save_requested = self.save_requested or agreed == self.SAVES
        return agreed == self.STOPS
