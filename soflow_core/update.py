"""The update of a training step: what clipping, optimizer and averages do once its gradients are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_

from soflow_core.ema import EMA
from soflow_core.recorded_passes import Recorder, Recording
from soflow_core.recorded_update import RecordedUpdate

RATE = "learning rate"
"""Key of it among the numbers of an update, whose others are weights of averages by name."""


class Update:
    """Changes parameters and averages by the parameters' gradients.

    `trained` are all parameters of the optimizer, `averaged` those of the network, which `ema` averages.
    """

    def __init__(
        self,
        trained: Sequence[Tensor],
        averaged: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        clip_norm: float | None,
    ) -> None:
        self._trained, self._averaged = trained, averaged
        self._optimizer, self._ema, self._clip_norm = optimizer, ema, clip_norm
        self.refused = torch.zeros((), device=averaged[0].device)
        """1 on the device from a step that is not finite on, until it is set to 0: updates ahead are left out."""
        self._recorded: RecordedUpdate | None = None

    def record(self, recorder: Recorder | None = None) -> None:
        """Has updates behind recorded passes recorded too."""
        self._recorded = RecordedUpdate(self._on_device, self.refused.device, recorder)

    def forget(self) -> None:
        """Drops the recording, whose memory is no longer that of the optimizer's state."""
        if self._recorded is not None:
            self._recorded.forget()

    def __call__(self, norm: Tensor, rate: float, step: int) -> None:
        """The update to the step-th step, at this learning rate, for gradients whose norm is finite."""
        self._optimize(norm, rate)
        self._ema.update(self._averaged, step)

    def ahead(self, rate: float, step: int, passes: Recording | None) -> Tensor:
        """The same unless the device finds a gradient that is not finite, now or since `refused` was 0.

        `passes` are the recorded ones that the gradients are of, if they are. Returns (1 + N,): the norm of all gradients together,
        and of each.
        """
        each_step = self._ema.every == 1
        numbers = {RATE: rate, **(self._ema.weights(step) if each_step else {})}
        if passes is not None and self._recorded is not None:
            norms = self._recorded(passes, numbers)
            # For checkpoints: a recording leaves the tensor that it reads.
            self._set_rate(rate)
        else:
            norms = self._on_device(numbers)
        if not each_step:
            self._ema.update(self._averaged, step, self.refused)
        return norms

    def _on_device(self, numbers: Mapping[str, float | Tensor]) -> Tensor:
        """The part of `ahead` that is the device's alone, by the numbers that change from step to step."""
        norms = torch._foreach_norm([p.grad for p in self._trained if p.grad is not None])
        norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        torch.maximum(self.refused, (~torch.isfinite(norm)).float(), out=self.refused)
        self._optimize(norm, numbers[RATE], self.refused)
        weights = {name: weight for name, weight in numbers.items() if name != RATE}
        self._ema.add(self._averaged, weights, self.refused)
        return torch.stack([norm, *norms])

    def _optimize(self, norm: Tensor, rate: float | Tensor, refused: Tensor | None = None) -> None:
        """Clipping and the optimizer's step; none where `refused` is 1 on the device."""
        if self._clip_norm is not None:
            clip_grads_with_norm_(self._trained, self._clip_norm, norm, foreach=True)
        self._set_rate(rate)
        # As torch's GradScaler tells fused optimizers to leave an update out.
        cast(Any, self._optimizer).found_inf = refused
        self._optimizer.step()

    def _set_rate(self, rate: float | Tensor) -> None:
        """`capturable` is torch's word for an optimizer that can be recorded, with a learning rate on the device."""
        for group in self._optimizer.param_groups:
            group["lr"], group["capturable"] = rate, isinstance(rate, Tensor)
