"""Networks as sampling runs them: in bfloat16, and with the pass recorded once as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from soflow_core.networks import Architecture
from soflow_core.passes import Passes, PassPolicy
from soflow_core.recorded_passes import WARM_UP, CudaGraphs, Recorder, Work


class SamplingNetwork(Protocol):
    """Interface of a network that can be sampled: its config, and F(x, t, s, labels, scale)."""

    @property
    def config(self) -> Architecture:
        """Shape and classes of the samples."""

    def __call__(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Bfloat16Network:
    """A network whose passes run under bfloat16 autocast. Its weights, inputs and results stay float32."""

    network: SamplingNetwork

    @property
    def config(self) -> Architecture:
        return self.network.config

    def __call__(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W), (B,), (B,), (B,) int64 or None -> (B, C, H, W) float32."""
        passes = Passes(self.network, PassPolicy(precision="bfloat16"))
        return passes.low_precision(x, t, s, labels, scale)


@dataclass(frozen=True)
class RecordedForward:
    """A recorded pass and the memory that it reads and writes."""

    inputs: Sequence[Tensor]
    output: Tensor
    """(B, C, H, W)"""
    replay: Work

    def repeat(self, inputs: Sequence[Tensor]) -> Tensor:
        """The pass of other inputs of the same shapes, in memory of its own: the next replay writes over the recorded output."""
        torch._foreach_copy_(list(self.inputs), list(inputs))
        self.replay()
        return self.output.clone()


class RecordedNetwork:
    """A network whose pass is recorded for each shape of its inputs, and replayed with other inputs of that shape.

    A replay is one launch in place of one for each kernel. A sampler's arithmetic stays outside: everything that a pass takes is a
    tensor, and is copied to where it was. Guided sampling has passes of twice the rows, which are a recording of their own. Every
    result is that of a replay, the first one's too, so that a sample does not depend on how many passes were made before it.
    """

    def __init__(self, network: SamplingNetwork, recorder: Recorder | None = None) -> None:
        self._network = network
        self._recorder = recorder or CudaGraphs()
        self._recordings: dict[Hashable, RecordedForward] = {}

    @property
    def config(self) -> Architecture:
        return self._network.config

    def __call__(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W), (B,), (B,), (B,) int64 or None -> (B, C, H, W), without gradient."""
        inputs = [each for each in (x, t, s, labels, scale) if each is not None]
        key = labels is None, *((each.shape, each.dtype) for each in inputs)
        # Outside inference mode, so that every pass has the same kind of tensors, for which compiled blocks are compiled once, and a
        # recording can be written to in either mode.
        with torch.inference_mode(False), torch.no_grad():
            if key not in self._recordings:
                self._recordings[key] = self._record(inputs, labels is None)
            return self._recordings[key].repeat(inputs)

    def _record(self, inputs: Sequence[Tensor], unlabelled: bool) -> RecordedForward:
        own = [each.clone() for each in inputs]
        x, t, s, *conditions = own
        results: list[Tensor] = []

        def forward() -> None:
            arguments = (None, *conditions) if unlabelled else conditions
            results[:] = [self._network(x, t, s, *arguments)]

        # Libraries allocate, and compilers compile, in passes that are not recorded.
        for _ in range(WARM_UP):
            self._recorder.warm_up(forward)
        replay = self._recorder.record(forward)
        return RecordedForward(own, results[0], replay)
