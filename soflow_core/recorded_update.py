"""The update of a training step, recorded once as a CUDA graph and replayed behind the recorded passes whose gradients it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from soflow_core.recorded_passes import CudaGraphs, Recorder, Recording, Work, on_device

Update = Callable[[Mapping[str, Tensor]], Tensor]
"""Updates parameters and averages from their gradients, with numbers () that change from step to step; -> what the host reads."""


class RecordedUpdate:
    """Does `update` for the gradients of one recording of passes after the other; one recording is kept.

    The optimizer's state must be there, in the memory in which it stays: updates before the first one make it.
    """

    def __init__(self, update: Update, device: torch.device, recorder: Recorder | None = None) -> None:
        self._update = update
        self._device = device
        self._recorder = recorder or CudaGraphs()
        self.forget()

    def forget(self) -> None:
        """Drops the recording, whose memory is no longer that of the training's state."""
        self._passes: Recording | None = None
        self._numbers: dict[str, Tensor] = {}
        self._result: list[Tensor] = []
        self._replay: Work | None = None

    def __call__(self, passes: Recording, numbers: Mapping[str, float]) -> Tensor:
        """The update for these passes' gradients; what `update` returns, in memory of its own."""
        if self._passes is not passes or self._replay is None:
            self._record(passes, numbers)
        assert self._replay is not None
        with torch.no_grad():
            for name, number in self._numbers.items():
                number.fill_(numbers[name])
            self._replay()
            return self._result[0].clone()

    def _record(self, passes: Recording, numbers: Mapping[str, float]) -> None:
        self.forget()
        own, result = on_device(numbers, self._device), self._result
        self._replay = self._recorder.record(lambda: result.append(self._update(own)))
        self._passes, self._numbers = passes, own
