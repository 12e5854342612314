"""MeanFlow (arXiv 2505.13447): the average velocity from its total derivative along the path."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch

from soflow_core.guidance import VelocityGuidance, drop_labels
from soflow_core.objectives.average_velocity import (
    GuidedModel,
    Start,
    branch_means,
    differential_target,
    draw_pairs,
    guided_target,
    leading_rows,
)
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
from soflow_core.rows import row_mean, row_sum
from soflow_core.settings import check_share, check_weight_eps
from soflow_core.times import LogitNormal, TimeDistribution


@register("meanflow")
@dataclass(frozen=True)
class MeanFlow(GuidedModel):
    """Settings of MeanFlow; the defaults are its ImageNet recipe without guidance."""

    flow_matching_share: float = 0.75
    """Share of the batch with s = t, which is Flow Matching."""
    weight_power: float = 1.0
    """p of the weight 1 / (S + eps)^p, with S the sum of squares over a sample."""
    weight_eps: float = 0.01
    """eps of that weight."""
    time: TimeDistribution = field(default_factory=lambda: LogitNormal(-0.4, 1.0))
    """Distribution of both times; t is the larger."""
    guidance: VelocityGuidance = field(default_factory=VelocityGuidance)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("flow_matching_share", self.flow_matching_share)
        check_weight_eps(self.weight_eps)

    @property
    def uses_jvp(self) -> bool:
        return self.derivative == "jvp" and self.flow_matching_share < 1

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        del step, total_steps
        return {}

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        velocity_rows = int(self.flow_matching_share * source.batch_size)
        noise = source.normal(*sample_shape)
        t, s = draw_pairs(source, self.time, velocity_rows)
        dropped = leading_rows(source, self.guidance.drop)
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
        del step, total_steps
        passes = Passes(network, policy)
        path = linear(draws.t)
        labels, dropped = batch.labels, torch.zeros_like(draws.t, dtype=torch.bool)
        if labels is not None:
            dropped = dropped_rows(draws)
            labels = drop_labels(labels, dropped)
        x_t, v_c = path.state(batch.x0, draws.noise), path.velocity(batch.x0, draws.noise)
        start = Start(x_t, v_c, draws.t, draws.s, labels, draws.velocity_rows)
        prediction = passes.low_precision(x_t, draws.t, draws.s, labels)
        with torch.no_grad():
            velocity = guided_target(passes, start, self.guidance, dropped, prediction)
            target = differential_target(passes, start, velocity, self.total_derivative)
        squares = (prediction - target).square()
        total = row_sum(squares)
        # Adaptive weight (MeanFlow, section 4.3): S / sg(S + eps)^p.
        loss = (total / (total.detach() + self.weight_eps) ** self.weight_power).mean()
        return Loss(loss, branch_means(draws, row_mean(squares)))
