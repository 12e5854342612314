"""Number of network evaluations of a method, in training and in sampling, counted by running it on a stub network.

Training is counted in forward passes of one sample: a backward pass counts two more, the tangent of a Jacobian-vector
product one more. Rows that a CPU skips because they are multiplied by 0 are counted too, so that the number is the
same on every device.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from soflow_core.objectives import Batch, Objective
from soflow_core.passes import PassPolicy

SCHEDULE_POINTS = 64
"""Number of steps, spread over training, whose evaluations are averaged: schedules change what a step does."""

LARGEST_COUNTED = 2**16
"""Samples of a batch that are counted; shares of a larger batch are the same to five digits."""

_SAMPLE = (1, 1, 1)


class _Counter:
    """Stub for a network F(x, t, s, labels) that counts rows and passes."""

    def __init__(self) -> None:
        self.rows = 0
        self.passes = 0
        self._scale = torch.zeros((), requires_grad=True)

    def __call__(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        del t, s, labels, scale
        self.rows += len(x)
        self.passes += len(x) * ((3 if torch.is_grad_enabled() else 1) + _has_tangent(x))
        return x * self._scale


def _has_tangent(x: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:
        # No forward-mode derivative is being taken.
        return False


def training_evaluations(objective: Objective, batch: int, conditional: bool = True) -> float:
    """Cost of one sample of a training step in forward passes, averaged over training; a phase of the method is run once."""
    batch = min(batch, LARGEST_COUNTED)
    counts: dict[Hashable, float] = {}
    phases = [objective.phase(step, SCHEDULE_POINTS) for step in range(SCHEDULE_POINTS)]
    for step, phase in enumerate(phases):
        if phase not in counts:
            counts[phase] = _passes_of_a_step(objective, batch, conditional, step) / batch
    return statistics.mean(counts[phase] for phase in phases)


def _passes_of_a_step(objective: Objective, batch: int, conditional: bool, step: int) -> int:
    counter = _Counter()
    draws = objective.draw(torch.Generator().manual_seed(0), batch, _SAMPLE, conditional)
    labels = torch.zeros(batch, dtype=torch.int64) if conditional else None
    data = Batch(torch.ones(batch, *_SAMPLE), labels)
    objective.loss(counter, data, draws, step, SCHEDULE_POINTS, PassPolicy(skip_unused=False))
    return counter.passes


@torch.inference_mode()
def sampling_evaluations(objective: Objective, steps: int, conditional: bool = True) -> int:
    """Function evaluations (NFE) of one image sampled in `steps` steps; one with guidance at sampling counts two."""
    counter = _Counter()
    noise = torch.zeros(1, *_SAMPLE)
    labels = torch.zeros(1, dtype=torch.int64) if conditional else None
    objective.sample(counter, noise, labels, steps, [noise] * (steps - 1))
    return counter.rows


def steps_for(objective: Objective, evaluations: int, conditional: bool = True) -> int:
    """Number of sampling steps with this many evaluations. Raises ValueError where there is none."""
    each = sampling_evaluations(objective, 1, conditional)
    steps, rest = divmod(evaluations, each)
    if rest:
        raise ValueError(
            f"{evaluations} evaluations cannot be had, for {objective.method} makes {each} in a step as it is sampled"
        )
    sampling_evaluations(objective, steps, conditional)
    return steps
