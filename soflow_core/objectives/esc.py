"""Explicit ShortCut (ESC, arXiv 2512.11831): MeanFlow whose velocities are, in part, those of all images of a batch.

Its changes to MeanFlow's training: the plug-in velocity, steps to s = 0 first, a derivative that comes in gradually, and
another loss weight.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from soflow_core.guidance import VelocityGuidance, draw_dropped, drop_labels
from soflow_core.objectives.average_velocity import (
    GuidedModel,
    Start,
    branch_means,
    differential_target,
    draw_pairs,
    guided_target,
)
from soflow_core.objectives.base import DEFAULT_POLICY, Batch, Draws, Loss, dropped_rows, logged
from soflow_core.passes import Network, Passes, PassPolicy
from soflow_core.paths import linear
from soflow_core.plug_in_velocity import plug_in_velocity
from soflow_core.random_source import RandomSource
from soflow_core.registration import register
from soflow_core.rows import choose_rows, row_mean, row_sum
from soflow_core.settings import check_share, check_weight_eps
from soflow_core.times import LogitNormal, TimeDistribution


@dataclass(frozen=True)
class PlugInDraws(Draws):
    """Randomness of a step of ESC."""

    plugged: Tensor = field(kw_only=True)
    """(B,) bool: rows with the plug-in velocity."""
    chance: Tensor = field(kw_only=True)
    """(B,) in [0, 1): s is 0 where it is below the share of such rows."""


@register("esc")
@dataclass(frozen=True)
class ExplicitShortcut(GuidedModel):
    """Settings of ESC; the defaults are the official code's for ImageNet 256, B/2."""

    flow_matching_share: float = 0.75
    """Share of the batch with s = t, which is Flow Matching."""
    plug_in_share: float = 0.5
    """Probability that a row's velocity is the plug-in velocity, not its sample's."""
    plug_in_images: Literal["label", "batch"] = "label"
    """Images of the batch that the plug-in velocity is of: those with the row's label, all where it is dropped; or always all."""
    zero_steps: int = 20_000
    """Steps over which the share of rows with s = 0, among those with s < t, falls from 1 to 0."""
    warmup_steps: int = 10_000
    """Steps over which the factor of the derivative in the target grows from 0 to 1."""
    weight_power: float = 1.0
    """p of the loss S^2 / (S^2 + eps)^p, with S the sum of squares over a sample."""
    weight_eps: float = 1e-3
    """eps of that weight."""
    time: TimeDistribution = field(default_factory=lambda: LogitNormal(-0.4, 1.0))
    """Distribution of both times; t is the larger."""
    guidance: VelocityGuidance = field(default_factory=lambda: VelocityGuidance(omega=1.0, kappa=0.5))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("flow_matching_share", self.flow_matching_share)
        check_share("plug_in_share", self.plug_in_share)
        check_weight_eps(self.weight_eps)
        for name in ("zero_steps", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 or more")

    @property
    def uses_jvp(self) -> bool:
        return self.derivative == "jvp" and self.flow_matching_share < 1

    @property
    def compares_images(self) -> bool:
        return self.plug_in_share > 0

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        del total_steps
        return {"zero_share": self.zero_share(step), "warmup": self.warmup(step)}

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        velocity_rows = int(self.flow_matching_share * source.batch_size)
        noise = source.normal(*sample_shape)
        t, s = draw_pairs(source, self.time, velocity_rows)
        dropped = draw_dropped(source, self.guidance.drop)
        return PlugInDraws(
            noise=noise,
            t=t,
            s=s,
            dropped=dropped if conditional else None,
            velocity_rows=source.leading(velocity_rows),
            plugged=source.uniform() < self.plug_in_share,
            chance=source.uniform(),
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
        assert isinstance(draws, PlugInDraws)
        passes = Passes(network, policy)
        labels, dropped = batch.labels, torch.zeros_like(draws.t, dtype=torch.bool)
        if labels is not None:
            dropped = dropped_rows(draws)
            labels = drop_labels(labels, dropped)
        x_t = linear(draws.t).state(batch.x0, draws.noise)
        velocity = self._velocity(batch, draws, dropped)
        scheduled = self.scheduled(policy, step, total_steps)
        s = end_times(draws, scheduled["zero_share"])
        start = Start(x_t, velocity, draws.t, s, labels, draws.velocity_rows)
        prediction = passes.low_precision(x_t, start.t, start.s, labels)
        with torch.no_grad():
            guided = guided_target(passes, start, self.guidance, dropped, prediction)
            target = differential_target(
                passes, start, guided, self.total_derivative, factor=scheduled["warmup"]
            )
        squares = (prediction - target).square()
        total = row_sum(squares).square()
        loss = (total / (total.detach() + self.weight_eps) ** self.weight_power).mean()
        terms = {name: logged(value, x_t.device) for name, value in scheduled.items()}
        return Loss(loss, {**branch_means(draws, row_mean(squares)), **terms})

    def zero_share(self, step: int) -> float:
        """Share of rows with s = 0 after `step` steps: (2 / pi) arccos(k / n), and 0 from step n on."""
        return 2 / math.pi * math.acos(step / self.zero_steps) if step < self.zero_steps else 0.0

    def warmup(self, step: int) -> float:
        """Factor of the derivative after `step` steps: k / m, and 1 from step m on."""
        return step / self.warmup_steps if step < self.warmup_steps else 1.0

    def _velocity(self, batch: Batch, draws: PlugInDraws, dropped: Tensor) -> Tensor:
        """-> (B, C, H, W): the plug-in velocity in the rows that are to have it, v_c in the others."""
        v_c = linear(draws.t).velocity(batch.x0, draws.noise)
        if not self.compares_images:
            return v_c
        whole = batch if batch.whole is None else batch.whole
        allowed = torch.ones(len(v_c), len(whole.x0), dtype=torch.bool, device=v_c.device)
        if batch.labels is not None and whole.labels is not None and self.plug_in_images == "label":
            allowed = (batch.labels[:, None] == whole.labels) | dropped[:, None]
        return choose_rows(
            draws.plugged, plug_in_velocity(batch.x0, draws.noise, draws.t, whole.x0, allowed), v_c
        )


def end_times(draws: PlugInDraws, zero_share: float | Tensor) -> Tensor:
    """-> s (B,): 0 in this share of the rows behind the velocity rows."""
    s, first = draws.s, draws.velocity_rows
    return torch.cat([s[:first], torch.where(draws.chance[first:] < zero_share, 0, s[first:])])
