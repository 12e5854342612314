"""The passes of a training step, forward and backward, recorded once as a CUDA graph and replayed in later steps.

A replay is one launch in place of thousands, for steps whose kernels are shorter than their launches. It repeats the recorded kernels
on the recorded memory: batch, draws and values of schedules are copied to where they were, and gradients appear where they were.
Whatever else a loss takes from the host is what it was in the recorded step, so that a recording serves the steps of one phase.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from soflow_core.objectives.base import Batch, Draws

WARM_UP = 3
"""Steps before a recording: libraries allocate their workspaces, and compilers compile, in the first ones."""

Work = Callable[[], None]
Compute = Callable[[Batch, Draws, Mapping[str, Tensor]], dict[str, Tensor]]
"""Sets the gradients of all parameters anew, from a batch, draws and values of schedules; -> () tensors to log."""


class Recorder(Protocol):
    """How work on a device is recorded."""

    def warm_up(self, work: Work) -> None:
        """Does the work as a step before its recording."""

    def record(self, work: Work) -> Work:
        """-> a function that repeats the work on the memory it had. The work may not be done yet when this returns."""


class CudaGraphs(Recorder):
    """CUDA graphs of the current GPU."""

    def warm_up(self, work: Work) -> None:
        # What autograd keeps of a stream must be of one that is not recorded on: the recording has a stream of its own, too.
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            work()
        current.wait_stream(aside)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on meanwhile: those of the loader and of the copy of a checkpoint.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay


@dataclass(frozen=True)
class Recording:
    """Recorded work and the memory it reads and writes."""

    batch: Batch
    draws: Draws
    schedules: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    gradients: Sequence[Tensor | None]
    replay: Work

    def repeat(self, batch: Batch, draws: Draws, schedules: Mapping[str, float]) -> None:
        """Does the recorded work with other inputs of the same shapes."""
        with torch.no_grad():
            torch._foreach_copy_(inputs_of(self.batch, self.draws), inputs_of(batch, draws))
            for name, value in self.schedules.items():
                value.fill_(schedules[name])
            self.replay()


class RecordedPasses:
    """Does `compute` for one step after the other, from a recording where the step before had the same phase and shapes.

    One recording is kept. Its memory is its own: what a step returns, and its gradients, are valid until the next.
    """

    def __init__(
        self, compute: Compute, parameters: Sequence[Tensor], recorder: Recorder | None = None
    ) -> None:
        self._compute = compute
        self._parameters = parameters
        self._recorder = recorder or CudaGraphs()
        self._key: Hashable = None
        self._warmed = 0
        self._recording: Recording | None = None

    @property
    def recording(self) -> Recording | None:
        """What the last step was replayed from, and the next one of the same phase and shapes will be; None where it was not."""
        return self._recording

    def forget(self) -> None:
        """Drops the recording, whose loss is no longer that of the training."""
        self._recording, self._key, self._warmed = None, None, 0

    def __call__(
        self, phase: Hashable, batch: Batch, draws: Draws, schedules: Mapping[str, float]
    ) -> Mapping[str, Tensor]:
        """The step's values, () each, on the device; its gradients are those of the parameters afterwards."""
        fixed = (value for value in vars(draws).values() if not isinstance(value, Tensor))
        key = phase, *fixed, *((each.shape, each.dtype) for each in inputs_of(batch, draws))
        if key != self._key:
            self.forget()
            self._key = key
        if self._recording is None and self._warmed < WARM_UP:
            self._warmed += 1
            return self._warm_up(batch, draws, schedules)
        if self._recording is None:
            self._recording = self._record(batch, draws, schedules)
        self._recording.repeat(batch, draws, schedules)
        for parameter, gradient in zip(self._parameters, self._recording.gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        return self._recording.values

    def _warm_up(self, batch: Batch, draws: Draws, schedules: Mapping[str, float]) -> Mapping[str, Tensor]:
        values: dict[str, Tensor] = {}
        numbers = on_device(schedules, batch.x0.device)
        self._recorder.warm_up(lambda: values.update(self._compute(batch, draws, numbers)))
        return values

    def _record(self, batch: Batch, draws: Draws, schedules: Mapping[str, float]) -> Recording:
        own = copy_of(batch, draws)
        numbers = on_device(schedules, batch.x0.device)
        values: dict[str, Tensor] = {}
        replay = self._recorder.record(lambda: values.update(self._compute(*own, numbers)))
        return Recording(*own, numbers, values, [p.grad for p in self._parameters], replay)


def inputs_of(batch: Batch, draws: Draws) -> list[Tensor]:
    """All tensors of a batch and draws, in an order of their own."""
    labels = [] if batch.labels is None else [batch.labels]
    return [batch.x0, *labels, *draws.tensors().values()]


def copy_of(batch: Batch, draws: Draws) -> tuple[Batch, Draws]:
    """Both in memory of their own."""
    labels = None if batch.labels is None else batch.labels.clone()
    own: dict[str, Any] = {name: value.clone() for name, value in draws.tensors().items()}
    return Batch(batch.x0.clone(), labels), replace(draws, **own)


def on_device(numbers: Mapping[str, float], device: torch.device) -> dict[str, Tensor]:
    """() tensors, made by the device."""
    return {name: torch.full((), value, device=device) for name, value in numbers.items()}
