"""Shortcut models (arXiv 2410.12557): one step of size 2d is trained to be two steps of size d.

F(x, t, t - d) is the velocity of a step of size d. The step size reaches the network as t - s, like every
other method's.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from soflow_core.guidance import draw_dropped, drop_labels, guide_prediction, null_labels
from soflow_core.objectives.average_velocity import AverageVelocityModel
from soflow_core.objectives.base import (
    DEFAULT_POLICY,
    Batch,
    Draws,
    Loss,
    dropped_rows,
)
from soflow_core.passes import Network, Passes, PassPolicy
from soflow_core.paths import linear
from soflow_core.random_source import RandomSource
from soflow_core.registration import register
from soflow_core.rows import choose_rows, per_row, row_mean
from soflow_core.settings import check_drop

CLIP = 4.0
"""Bound of the elements of states between half steps, and of targets (the official code)."""
MOST_STEPS = 2**20
"""Of the finest step size: times are float32."""


@register("shortcut")
@dataclass(frozen=True)
class Shortcut(AverageVelocityModel):
    """Settings of Shortcut models; the defaults are the official code's."""

    fixed_settings: ClassVar[frozenset[str]] = frozenset({"teacher_ema"})

    base_steps: int = 128
    """Steps of the finest grid; a power of 2."""
    bootstrap_share: float = 0.125
    """Share of the batch trained on two half steps; the rest is Flow Matching at the finest step."""
    teacher_ema: float = 0.999
    """Decay of the EMA whose network makes the half steps."""
    drop: float = 0.1
    """Probability that a Flow Matching sample's label is replaced by the null label."""
    scale: float = 1.5
    """Guidance scale inside the target made of the two finest steps; 1 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.base_steps <= MOST_STEPS or self.base_steps & (self.base_steps - 1):
            raise ValueError(
                f"base_steps is {self.base_steps}; a power of 2, from 2 to {MOST_STEPS:,}, is needed"
            )
        check_drop("drop", self.drop)
        if not 0 <= self.teacher_ema < 1:
            raise ValueError(f"teacher_ema is {self.teacher_ema}; a decay from 0 to below 1 is needed")
        if not 0 <= self.bootstrap_share <= 1:
            raise ValueError(f"bootstrap_share is {self.bootstrap_share}; a share from 0 to 1 is needed")
        if self.scale != 1 and self.drop == 0:
            raise ValueError("scale needs an unconditional prediction; set drop above 0 or scale to 1")

    @property
    def needs_null_label(self) -> bool:
        return self.drop > 0

    @property
    def trained_guidance(self) -> float | None:
        return self.scale

    @property
    def teacher_decay(self) -> float | None:
        return self.teacher_ema

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        del step, total_steps
        return {}

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        velocity_rows = source.batch_size - int(self.bootstrap_share * source.batch_size)
        noise = source.normal(*sample_shape)
        row, levels = source.rows, int(math.log2(self.base_steps))
        # Bootstrap rows cycle through the step sizes from a random one: a small batch does not contain them all.
        level = (row + source.common_integer(levels)) % levels
        sections = torch.where(row < velocity_rows, self.base_steps, 2**level)
        uniform = source.uniform()
        t = ((uniform * sections).floor() + 1) / sections
        dropped = draw_dropped(source, self.drop) & (row < velocity_rows)
        return Draws(
            noise, t, t - 1 / sections, dropped if conditional else None, source.leading(velocity_rows)
        )

    def loss(
        self,
        network: Network,
        batch: Batch,
        draws: Draws,
        step: int,
        total_steps: int,
        policy: PassPolicy = DEFAULT_POLICY,
    ) -> Loss:
        del step, total_steps
        passes = Passes(network, policy)
        first = draws.velocity_rows
        path = linear(draws.t)
        x_t, v_c = path.state(batch.x0, draws.noise), path.velocity(batch.x0, draws.noise)
        labels = None if batch.labels is None else drop_labels(batch.labels, dropped_rows(draws))
        target = v_c
        if first < len(x_t) or policy.uniform:
            rest = None if labels is None else labels[first:]
            steps = self._two_half_steps(passes, x_t[first:], draws.t[first:], draws.s[first:], rest)
            target = torch.cat([v_c[:first], steps])
        prediction = passes.low_precision(x_t, draws.t, draws.s, labels)
        mse = row_mean((prediction - target).square())
        parts = {"velocity_mse": mse[:first], "bootstrap_mse": mse[first:]}
        return Loss(mse.mean(), {k: v.detach().mean() for k, v in parts.items() if len(v)})

    def sample(
        self,
        network: Network,
        noise: Tensor,
        labels: Tensor | None,
        steps: int,
        renoise: Sequence[Tensor] = (),
    ) -> Tensor:
        if steps < 1 or (
            self.sampling_times is None and self.sampling_grid is None and self.base_steps % steps
        ):
            raise ValueError(
                f"{steps} steps are not on the grid of {self.base_steps}; give a power of 2 up to it"
            )
        self._check_steps(self.step_times(steps))
        return super().sample(network, noise, labels, steps, renoise)

    def _check_steps(self, times: Sequence[float]) -> None:
        """Raises ValueError where a step is none that is trained: of a size 1, 1/2, 1/4, ..., from a multiple of it."""
        sizes = [2.0**-level for level in range(int(math.log2(self.base_steps)) + 1)]
        for start, following in pairwise(times):
            end = 0.0 if self.solution_sampler == "consistency" else following
            if start - end not in sizes or start % (start - end):
                raise ValueError(
                    f"the step from {start:g} to {end:g} is not trained; give steps of 1, 1/2, 1/4, ... from a multiple of them"
                )

    def _two_half_steps(
        self, passes: Passes, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None
    ) -> Tensor:
        """-> (B, C, H, W): mean velocity of two half steps of the teacher (Shortcut, Eq. 5)."""
        middle = (t + s) / 2
        finest = t - middle < 1.5 / self.base_steps
        one = self._teach(passes, x, t, middle, labels, finest)
        between = (x - per_row(t - middle, x) * one).clamp(-CLIP, CLIP)
        two = self._teach(passes, between, middle, s, labels, finest)
        return ((one + two) / 2).clamp(-CLIP, CLIP)

    def _teach(
        self, passes: Passes, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, guided: Tensor
    ) -> Tensor:
        """Velocity of the teacher, guided in the rows where `guided` (B,) holds, those of the finest steps."""
        velocity = passes.teacher(x, t, s, labels)
        if labels is None or self.scale == 1:
            return velocity
        unconditional = passes.forward_where(passes.teacher, guided, x, t, s, null_labels(len(x), x.device))
        return choose_rows(guided, guide_prediction(velocity, unconditional, self.scale), velocity)
