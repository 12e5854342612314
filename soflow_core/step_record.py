"""Result of one training step, as numbers and while the device still computes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepRecord:
    """Result of one step. A refused step (`finite` is False) changed nothing; `culprit` names the term."""

    step: int
    """Finished steps, this one included if it was taken."""
    loss: float
    """Mean over this rank's rows."""
    terms: dict[str, float]
    """Logged terms of the loss, each the mean over the pieces that have it."""
    grad_norm: float
    """Norm of all gradients together, before clipping."""
    learning_rate: float
    finite: bool = True
    culprit: str | None = None

    @classmethod
    def of(
        cls, step: int, values: Mapping[str, float], grad_norm: float, rate: float, culprit: str | None = None
    ) -> StepRecord:
        """`values` are the terms with the loss among them."""
        terms = {name: value for name, value in values.items() if name != "loss"}
        return cls(step, values["loss"], terms, grad_norm, rate, culprit is None, culprit)


@dataclass(frozen=True)
class StartedStep:
    """A step whose numbers are still on the device."""

    before: int
    """Finished steps before it."""
    rate: float
    terms: tuple[str, ...]
    gradients: tuple[str, ...]
    """Names of the parameters that have a gradient."""
    numbers: Tensor
    """Values of the terms, the norm of all gradients together, and that of each."""

    @classmethod
    def of(
        cls, before: int, rate: float, values: Mapping[str, Tensor], gradients: Sequence[str], norms: Tensor
    ) -> StartedStep:
        """`norms` (1 + N,) are that of all gradients together, and those of the N named ones."""
        numbers = torch.cat([torch.stack(list(values.values())), norms])
        return cls(before, rate, tuple(values), tuple(gradients), numbers)

    def record(self, numbers: Sequence[float]) -> StepRecord:
        """The step's record, from what `numbers` has become on the host."""
        count = len(self.terms)
        values, norm = dict(zip(self.terms, numbers[:count], strict=True)), numbers[count]
        if math.isfinite(norm):
            return StepRecord.of(self.before + 1, values, norm, self.rate)
        bad = [
            name
            for name, of_it in zip(self.gradients, numbers[count + 1 :], strict=True)
            if not math.isfinite(of_it)
        ]
        return StepRecord.of(self.before, values, norm, self.rate, culprit(values, bad, len(self.gradients)))


def read(started: Sequence[StartedStep]) -> list[StepRecord]:
    """Waits for the device; the records of steps in their order, up to the first refused one."""
    records: list[StepRecord] = []
    numbers: list[float] = torch.cat([each.numbers for each in started]).tolist() if started else []
    for each in started:
        own, numbers = numbers[: len(each.numbers)], numbers[len(each.numbers) :]
        records.append(each.record(own))
        if not records[-1].finite:
            break
    return records


def culprit(values: Mapping[str, float], bad: Sequence[str], count: int) -> str:
    """What made a step non-finite: the first such term, the loss, or gradients, of `count` in all."""
    broken = [name for name, value in values.items() if not math.isfinite(value)]
    if broken:
        return next((name for name in broken if name != "loss"), "loss")
    if not bad:
        return "gradient norm"
    return f"gradient of {bad[0]}" if len(bad) < count else "gradients of all parameters"
