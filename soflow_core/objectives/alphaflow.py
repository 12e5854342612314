"""alpha-Flow (arXiv 2510.20771): trajectory Flow Matching (alpha = 1) turns into MeanFlow (alpha = 0)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from soflow_core.guidance import VelocityGuidance, draw_dropped, drop_labels
from soflow_core.objectives.alpha_schedule import AlphaSchedule
from soflow_core.objectives.average_velocity import (
    GuidedModel,
    Start,
    branch_means,
    differential_target,
    draw_pairs,
    guided_target,
)
from soflow_core.objectives.base import (
    DEFAULT_POLICY,
    Batch,
    Draws,
    Loss,
    dropped_rows,
    logged,
)
from soflow_core.passes import Network, Passes, PassPolicy, Scheduled
from soflow_core.paths import linear
from soflow_core.random_source import RandomSource
from soflow_core.registration import register
from soflow_core.rows import per_row, row_mean
from soflow_core.settings import check_share, check_weight_eps
from soflow_core.times import LogitNormal, TimeDistribution

CLIP = 4.0
"""Bound of the target's elements (alpha-Flow's official code)."""


@register("alphaflow")
@dataclass(frozen=True)
class AlphaFlow(GuidedModel):
    """Settings of alpha-Flow; the defaults are the paper's for B/2, with kappa of the released configuration."""

    flow_matching_share: float = 0.25
    """Share of the batch with s = t, which is Flow Matching."""
    weight_eps: float = 1e-3
    """c of the weight alpha / (mse + c)."""
    time: TimeDistribution = field(default_factory=lambda: LogitNormal(-0.4, 1.0))
    """Distribution of both times; t is the larger."""
    guidance: VelocityGuidance = field(default_factory=lambda: VelocityGuidance(omega=1.0, kappa=0.5))
    schedule: AlphaSchedule = field(default_factory=AlphaSchedule)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("flow_matching_share", self.flow_matching_share)
        check_weight_eps(self.weight_eps)

    @property
    def uses_jvp(self) -> bool:
        return self.derivative == "jvp" and self.flow_matching_share < 1 and self.schedule.reaches_zero

    def phase(self, step: int, total_steps: int) -> Hashable:
        alpha = self.schedule.alpha(step, total_steps)
        return alpha if alpha in (0, 1) else "between"

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        alpha = self.schedule.alpha(step, total_steps)
        return {"alpha": alpha, "rest": 1 - alpha}

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        velocity_rows = int(self.flow_matching_share * source.batch_size)
        noise = source.normal(*sample_shape)
        t, s = draw_pairs(source, self.time, velocity_rows)
        # Labels are dropped inside the window only, and dropped rows keep the guided target.
        dropped = draw_dropped(source, self.guidance.drop) & self.guidance.inside(t)
        return Draws(noise, t, s, dropped if conditional else None, source.leading(velocity_rows))

    def loss(
        self,
        network: Network,
        batch: Batch,
        draws: Draws,
        step: int,
        total_steps: int,
        policy: PassPolicy = DEFAULT_POLICY,
    ) -> Loss:
        passes = Passes(network, policy)
        # Which passes are made is known on the host; the value itself may be on the device.
        known, scheduled = self.schedule.alpha(step, total_steps), self.scheduled(policy, step, total_steps)
        alpha = scheduled["alpha"]
        path = linear(draws.t)
        labels = None if batch.labels is None else drop_labels(batch.labels, dropped_rows(draws))
        x_t, v_c = path.state(batch.x0, draws.noise), path.velocity(batch.x0, draws.noise)
        start = Start(x_t, v_c, draws.t, draws.s, labels, draws.velocity_rows)
        prediction = passes.high_precision(x_t, draws.t, draws.s, labels)
        nowhere = torch.zeros_like(draws.t, dtype=torch.bool)
        with torch.no_grad():
            velocity = guided_target(passes, start, self.guidance, nowhere, prediction)
            if known == 0:
                target = differential_target(passes, start, velocity, self.total_derivative)
            else:
                target = self._discrete_target(passes, start, velocity, scheduled, known == 1)
        mse = row_mean((prediction - target).square())
        differential = (torch.arange(len(mse), device=mse.device) < start.first) | (known == 0)
        weight = torch.where(differential, 1.0, alpha) / (mse.detach() + self.weight_eps)
        terms = {**branch_means(draws, mse), "alpha": logged(alpha, mse.device)}
        return Loss((weight * mse).mean(), terms)

    def _discrete_target(
        self, passes: Passes, start: Start, velocity: Tensor, scheduled: Scheduled, trajectory: bool
    ) -> Tensor:
        """-> (B, C, H, W): alpha v + (1 - alpha) u(x - dt v, t - dt, s), dt = alpha (t - s) (alpha-Flow, Def. 1).

        In a `trajectory`, where alpha = 1, it needs no pass.
        """
        first = start.first
        if first == len(start.x) and not passes.policy.uniform:
            return velocity
        t, s = start.t[first:], start.s[first:]
        labels = None if start.labels is None else start.labels[first:]
        alpha, rest = scheduled["alpha"], scheduled["rest"]
        middle = t - alpha * (t - s)
        v = velocity[first:]
        x = start.x[first:] + per_row(middle - t, v) * v
        later = v if trajectory else passes.high_precision(x, middle, s, labels)
        target = (alpha * v + rest * later).clamp(-CLIP, CLIP)
        return torch.cat([velocity[:first], target])
