"""Classifier-free guidance inside the training target: guided velocity, its decay near t = 1, dropped labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from soflow_core.labels import NULL_LABEL
from soflow_core.random_source import RandomSource
from soflow_core.rows import per_row
from soflow_core.settings import STRICT, check_drop, check_values

DECAY_RATE = 0.025
"""kappa_d of the guidance decay (SoFlow's official code)."""


@dataclass(frozen=True)
class ScaleRange:
    """Guidance scales that one network is trained on, log-uniform; the network takes the scale as a condition."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    low: float
    high: float

    def __post_init__(self) -> None:
        check_values(self)
        if not 1 <= self.low < self.high:
            raise ValueError(f"guidance scales from {self.low} to {self.high}; give 1 <= low < high")

    @property
    def middle(self) -> float:
        """The geometric mean of both ends."""
        return math.sqrt(self.low * self.high)

    def sample(self, source: RandomSource) -> Tensor:
        """-> (n,): a scale for each row."""
        return self.low * (self.high / self.low) ** source.uniform()


@dataclass(frozen=True)
class EndRange:
    """Times that one end of a guidance interval is drawn from, uniformly; the network takes the interval as a condition."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    low: float
    high: float

    def __post_init__(self) -> None:
        check_values(self)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"an end of the guidance interval from {self.low} to {self.high}; give 0 <= low < high <= 1"
            )

    @property
    def middle(self) -> float:
        """The mean of both ends."""
        return (self.low + self.high) / 2

    def sample(self, source: RandomSource) -> Tensor:
        """-> (n,): a time for each row."""
        return self.low + (self.high - self.low) * source.uniform()

    def holds(self, time: float) -> bool:
        """Whether the range has this time."""
        return self.low <= time <= self.high


def draw_scale(scale: float | ScaleRange, source: RandomSource, dropped: Tensor) -> Tensor | None:
    """(n,) bool -> (n,): scales of the rows, 1 where the label is dropped; None where the setting is one scale."""
    if not isinstance(scale, ScaleRange):
        return None
    return torch.where(dropped, 1.0, scale.sample(source))


def scale_of(condition: Tensor) -> Tensor:
    """(B,) or (B, 3) -> (B,): the scales of a guidance condition, which may have the ends of an interval beside them."""
    return condition if condition.dim() == 1 else condition[:, 0]


def at_all_times(scale: Tensor, condition: Tensor) -> Tensor:
    """(B,) -> (B,) or (B, 3) as `condition`: these scales, with the whole interval 0 to 1 where intervals are conditions."""
    if condition.dim() == 1:
        return scale
    return torch.stack([scale, torch.zeros_like(scale), torch.ones_like(scale)], dim=1)


def sampled_scale(trained: float | ScaleRange, chosen: float | None) -> float:
    """The guidance scale that a network is sampled at: `chosen`, or the one it was trained on, or a range's middle.

    Raises ValueError where it was not trained on the chosen one.
    """
    if isinstance(trained, ScaleRange):
        if chosen is not None and not trained.low <= chosen <= trained.high:
            raise ValueError(
                f"sampling_scale is {chosen}; the network is trained on scales from {trained.low} to {trained.high}"
            )
        return trained.middle if chosen is None else chosen
    if chosen is not None and chosen != trained:
        raise ValueError(
            f"sampling_scale is {chosen}; guidance.scale is {trained}, and a range there (low, high) trains a network"
            " for any scale of it"
        )
    return trained


@dataclass(frozen=True)
class Guidance:
    """Guidance of SoFlow's target. At a scale of 1 there is none: no label is dropped, no velocity mixed in."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    scale: float | ScaleRange = 3.0
    """w: 1 is no guidance. A range is drawn from, row by row, and is a condition of the network."""
    mix: float = 0.25
    """m: share of the guided sample velocity in the target; the rest is the network's own velocity."""
    drop: float = 0.1
    """Probability that a sample's label is replaced by the null label."""
    decay_from: float = 0.8
    """tau: the time above which guidance decays to nothing at t = 1; 1 never decays."""

    def __post_init__(self) -> None:
        check_values(self)
        if not isinstance(self.scale, ScaleRange) and self.scale < 1:
            raise ValueError(f"guidance.scale is {self.scale}; give 1 for no guidance or more for guidance")
        if not 0 < self.mix <= 1:
            raise ValueError(
                f"guidance.mix is {self.mix}; it must be above 0 and at most 1 (1 mixes nothing in)"
            )
        check_drop("guidance.drop", self.drop)
        if not 0 < self.decay_from <= 1:
            raise ValueError(
                f"guidance.decay_from is {self.decay_from}; a time above 0 and at most 1 is needed"
            )

    @property
    def active(self) -> bool:
        """Whether the target is guided."""
        return isinstance(self.scale, ScaleRange) or self.scale > 1

    def strength(self, t: Tensor, scale: Tensor | None = None) -> Tensor:
        """(B,) -> (B,): d(t) (w - 1). `scale` (B,) is w of each row where the setting is a range."""
        if isinstance(self.scale, ScaleRange):
            assert scale is not None
            return decay(t, self.decay_from) * (scale - 1)
        return decay(t, self.decay_from) * (self.scale - 1)


def decay(t: Tensor, decay_from: float, rate: float = DECAY_RATE) -> Tensor:
    """(B,) -> (B,): d(t) = 1 up to tau, then 1 - exp(-kappa z / (1 - z)), z = (1 - t) / (1 - tau), down to 0."""
    if decay_from >= 1:
        return torch.ones_like(t)
    z = ((1 - t) / (1 - decay_from)).clamp(0, 1 - 1e-6)
    return torch.where(t <= decay_from, torch.ones_like(t), -torch.expm1(-rate * z / (1 - z)))


def guided_velocity(sample: Tensor, unconditional: Tensor, strength: Tensor) -> Tensor:
    """(B, C, H, W) x 2, (B,) -> (B, C, H, W): v_c + d (w - 1) (v_c - v_u)."""
    return sample + per_row(strength, sample) * (sample - unconditional)


def mix_velocity(guided: Tensor, predicted: Tensor, mix: float) -> Tensor:
    """(B, C, H, W) x 2 -> (B, C, H, W): m v_g + (1 - m) v_p, where v_p carries no gradient."""
    return mix * guided + (1 - mix) * predicted.detach()


def draw_dropped(source: RandomSource, probability: float) -> Tensor:
    """-> (n,) bool: which labels are dropped, each independently with this probability."""
    return source.uniform() < probability


def drop_labels(labels: Tensor, dropped: Tensor) -> Tensor:
    """(B,) int64, (B,) bool -> (B,) int64 with the null label where dropped."""
    return torch.where(dropped, torch.full_like(labels, NULL_LABEL), labels)


def null_labels(count: int, device: torch.device) -> Tensor:
    """-> (count,) int64: the null label for every row."""
    return torch.full((count,), NULL_LABEL, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class VelocityGuidance:
    """Guidance of MeanFlow's target: v_g = omega v_c + (1 - omega - kappa) v_u + kappa v_p in a window of times.

    Its effective scale is omega / (1 - kappa). SoFlow's scale w and mix m are omega = m w, kappa = 1 - m.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    omega: float = 1.0
    kappa: float = 0.0
    start: float = 0.0
    """First time of the window."""
    end: float = 1.0
    """Last time of the window."""
    drop: float = 0.1
    """Probability that a sample's label is replaced by the null label."""

    def __post_init__(self) -> None:
        check_values(self)
        if not 0 <= self.kappa < 1:
            raise ValueError(f"guidance.kappa is {self.kappa}; it must be from 0 to below 1")
        if self.omega <= 0:
            raise ValueError(f"guidance.omega is {self.omega}; it must be above 0")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(
                f"the guidance window {self.start} to {self.end} is empty; give 0 <= start <= end <= 1"
            )
        check_drop("guidance.drop", self.drop)

    @property
    def active(self) -> bool:
        """Whether the target differs from the sample's velocity."""
        return self.omega != 1 or self.kappa != 0

    @property
    def scale(self) -> float:
        """The effective guidance scale omega / (1 - kappa)."""
        return self.omega / (1 - self.kappa)

    def inside(self, t: Tensor) -> Tensor:
        """(B,) -> (B,) bool: whether these times are guided."""
        return (t >= self.start) & (t <= self.end)

    def velocity(self, sample: Tensor, unconditional: Tensor, predicted: Tensor) -> Tensor:
        """(B, C, H, W) x 3 -> (B, C, H, W): v_g of v_c, v_u and v_p."""
        return self.omega * sample + (1 - self.omega - self.kappa) * unconditional + self.kappa * predicted


@dataclass(frozen=True)
class IntervalGuidance:
    """Guidance of improved MeanFlow's target: v_g = v_c + (1 - 1/w) (v_p - v_u) in an interval of times.

    It is `VelocityGuidance` with omega = 1 and kappa = 1 - 1/w.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    scale: float | ScaleRange = 1.0
    """w: 1 is no guidance. A range is drawn from, row by row, and is a condition of the network."""
    start: float | EndRange = 0.0
    """First time of the interval. A range is drawn from, row by row, and the interval is a condition of the network."""
    end: float | EndRange = 1.0
    """Last time of the interval; a range where `start` is one."""
    drop: float = 0.1
    """Probability that a sample's label is replaced by the null label."""

    def __post_init__(self) -> None:
        check_values(self)
        if not isinstance(self.scale, ScaleRange) and self.scale < 1:
            raise ValueError(f"guidance.scale is {self.scale}; give 1 for no guidance or more for guidance")
        self._check_interval()
        check_drop("guidance.drop", self.drop)

    def _check_interval(self) -> None:
        if isinstance(self.start, EndRange) != isinstance(self.end, EndRange):
            raise ValueError(
                "one end of the guidance interval is a range (low, high) and one is not; give both alike"
            )
        if self.varies and not isinstance(self.scale, ScaleRange):
            raise ValueError(
                "a guidance interval that varies needs a guidance.scale that does: give a range (low, high)"
            )
        first = self.start.high if isinstance(self.start, EndRange) else self.start
        last = self.end.low if isinstance(self.end, EndRange) else self.end
        if not 0 <= first <= last <= 1:
            raise ValueError(f"the guidance interval {first} to {last} is empty; give 0 <= start <= end <= 1")

    @property
    def varies(self) -> bool:
        """Whether the interval is drawn row by row."""
        return isinstance(self.start, EndRange)

    @property
    def active(self) -> bool:
        """Whether the target is guided."""
        return isinstance(self.scale, ScaleRange) or self.scale > 1

    def draw(self, source: RandomSource, dropped: Tensor, whole: Tensor) -> Tensor | None:
        """(n,) bool x 2 -> guidance conditions: scales (n,); with an interval that varies (n, 3), scale, first and last time.

        Rows whose label is dropped have the scale 1; these and those of `whole` have the interval 0 to 1. None where the setting is
        one scale.
        """
        scale = draw_scale(self.scale, source, dropped)
        if scale is None or not isinstance(self.start, EndRange) or not isinstance(self.end, EndRange):
            return scale
        ends = torch.stack([scale, self.start.sample(source), self.end.sample(source)], dim=1)
        return torch.where((whole | dropped)[:, None], at_all_times(scale, ends), ends)

    def inside(self, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B,) -> (B,) bool: whether these times are guided; `condition` (B, 3) where the interval varies."""
        if isinstance(self.start, EndRange) or isinstance(self.end, EndRange):
            assert condition is not None
            return (t >= condition[:, 1]) & (t <= condition[:, 2])
        return (t >= self.start) & (t <= self.end)

    def of_velocity(self, condition: Tensor, inside: Tensor) -> Tensor:
        """(B,) or (B, 3), (B,) bool -> the same shape: the condition under which a row's own velocity is predicted.

        Where intervals vary, it is the scale that the row's interval leaves at its time, 1 outside, as that of all times.
        """
        if condition.dim() == 1:
            return condition
        return at_all_times(torch.where(inside, condition[:, 0], 1.0), condition)

    def velocity(
        self, sample: Tensor, unconditional: Tensor, predicted: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """(B, C, H, W) x 3 -> (B, C, H, W): v_g of v_c, v_u and v_p; `scale` (B,) or (B, 3) where the setting is a range."""
        if isinstance(self.scale, ScaleRange):
            assert scale is not None
            return sample + per_row(1 - 1 / scale_of(scale), sample) * (predicted - unconditional)
        return sample + (1 - 1 / self.scale) * (predicted - unconditional)


def guide_prediction(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """(B, C, H, W) x 2 -> (B, C, H, W): v_u + w (v_c - v_u), guidance at sampling in all channels."""
    return unconditional + scale * (conditional - unconditional)
