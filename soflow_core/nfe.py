"""Number of network evaluations of a method, in training and in sampling, counted by running it on a stub network.

Training is counted in forward passes of one sample: a backward pass counts two more, the tangent of a Jacobian-vector
product one more. Rows that a CPU skips because they are multiplied by 0 are counted too, so that the number is the
same on every device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.autograd import forward_ad

from soflow_core.objectives import Batch, Objective
from soflow_core.passes import Head, PassPolicy, Precision

SCHEDULE_POINTS = 64
"""Number of steps, spread over training, whose evaluations are averaged: schedules change what a step does."""

LARGEST_COUNTED = 2**16
"""Samples of a batch that are counted; shares of a larger batch are the same to five digits."""

COMPARED = 64
"""Images, at most, that those of a counted batch are compared with."""

_SAMPLE = (1, 1, 1)


@dataclass(frozen=True)
class NetworkCall:
    """One call of the network in a training step."""

    rows: int
    gradient: bool
    """Whether a backward pass follows."""
    tangent: bool
    """Whether it takes a Jacobian-vector product."""
    bfloat16: bool
    head: Head = "average"

    @property
    def evaluations(self) -> int:
        """Cost in forward passes of one sample; a second head's own layers are not counted, for they depend on the network."""
        return self.rows * ((3 if self.gradient else 1) + self.tangent)


class _Recorder:
    """Stub for a network F(x, t, s, labels) that records its calls."""

    def __init__(self) -> None:
        self.calls: list[NetworkCall] = []
        self._scale = torch.zeros((), requires_grad=True)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        scale: Tensor | None = None,
        head: Head = "average",
    ) -> Tensor:
        del t, s, labels, scale
        bfloat16 = torch.is_autocast_enabled(x.device.type)
        self.calls.append(NetworkCall(len(x), torch.is_grad_enabled(), _has_tangent(x), bfloat16, head))
        return (torch.cat([x, x], dim=1) if head == "both" else x) * self._scale


def _has_tangent(x: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(x).tangent is not None
    except RuntimeError:
        # No forward-mode derivative is being taken.
        return False


def training_evaluations(objective: Objective, batch: int, conditional: bool = True) -> float:
    """Cost of one sample of a training step in forward passes, averaged over training; a phase of the method is run once."""
    batch = min(batch, LARGEST_COUNTED)
    phases = training_calls(objective, batch, conditional)
    return float(sum(share * sum(call.evaluations for call in calls) for share, calls in phases) / batch)


def training_calls(
    objective: Objective, batch: int, conditional: bool = True, precision: Precision = "float32"
) -> list[tuple[Fraction, list[NetworkCall]]]:
    """For each phase of a training: its share of the steps, and the calls of the network in one of its steps."""
    steps: dict[Hashable, int] = {}
    phases = [objective.phase(step, SCHEDULE_POINTS) for step in range(SCHEDULE_POINTS)]
    for step, phase in enumerate(phases):
        steps.setdefault(phase, step)
    counts = Counter(phases)
    return [
        (
            Fraction(counts[phase], SCHEDULE_POINTS),
            _calls_of_a_step(objective, batch, conditional, step, precision),
        )
        for phase, step in steps.items()
    ]


def _calls_of_a_step(
    objective: Objective, batch: int, conditional: bool, step: int, precision: Precision
) -> list[NetworkCall]:
    recorder = _Recorder()
    draws = objective.draw(torch.Generator().manual_seed(0), batch, _SAMPLE, conditional)
    labels = torch.zeros(batch, dtype=torch.int64) if conditional else None
    data = Batch(torch.ones(batch, *_SAMPLE), labels)
    # All images are equal: a few stand for the batch, of which a method that compares images would take all pairs.
    data.whole = data.rows(0, -(-batch // COMPARED))
    policy = PassPolicy(precision, skip_unused=False)
    objective.loss(recorder, data, draws, step, SCHEDULE_POINTS, policy)
    return recorder.calls


@torch.inference_mode()
def sampling_evaluations(objective: Objective, steps: int, conditional: bool = True) -> int:
    """Function evaluations (NFE) of one image sampled in `steps` steps; one with guidance at sampling counts two."""
    recorder = _Recorder()
    noise = torch.zeros(1, *_SAMPLE)
    labels = torch.zeros(1, dtype=torch.int64) if conditional else None
    objective.sample(recorder, noise, labels, steps, [noise] * (steps - 1))
    return sum(call.rows for call in recorder.calls)


def steps_for(objective: Objective, evaluations: int, conditional: bool = True) -> int:
    """Number of sampling steps with this many evaluations, by what the method's sampler says they cost.

    Raises ValueError where there is none, and where the sampler makes others than it says.
    """
    steps = _steps_below(objective, evaluations, conditional)
    made = 0 if steps == 0 else sampling_evaluations(objective, steps, conditional)
    if made == evaluations:
        return steps
    method, said = objective.method, _said(objective, steps, conditional)
    if made != said:
        assert objective.used_sampler is not None
        name = objective.used_sampler.name
        raise ValueError(
            f"{method} makes {made} evaluations in {steps} steps, and its sampler {name} says {said}: mend its `evaluations`"
        )
    following = _said(objective, steps + 1, conditional)
    makes = f"{made} in {steps} and {following} in {steps + 1} steps" if steps else f"{following} in a step"
    raise ValueError(f"{evaluations} evaluations cannot be had, for {method} makes {makes} as it is sampled")


def _steps_below(objective: Objective, evaluations: int, conditional: bool) -> int:
    """The largest number of steps that is said to cost at most this many evaluations; 0 where one costs more."""
    fitting, beyond = 0, evaluations + 1
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        if _said(objective, middle, conditional) <= evaluations:
            fitting = middle
        else:
            beyond = middle
    return fitting


def _said(objective: Objective, steps: int, conditional: bool) -> int:
    """Evaluations in `steps` steps by the method's sampler, with what guidance adds; in proportion where it has no such part."""
    if steps == 0:
        return 0
    sampler = objective.used_sampler
    first = sampling_evaluations(objective, 1, conditional)
    if sampler is None:
        return steps * first
    return sampler.evaluations(steps) * first // sampler.evaluations(1)
