"""Improved MeanFlow (iMF, arXiv 2512.02012): Flow Matching of V = u + (t - s) sg(du/dt), along the network's own velocity.

MeanFlow's target for u holds the sample's velocity twice, also as the direction of du/dt, which makes the target
depend on what a network cannot know. Here V is a prediction of the velocity that depends on x_t alone: du/dt is taken
along the network's velocity u(x_t, t, t).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from soflow_core.guidance import (
    EndRange,
    IntervalGuidance,
    ScaleRange,
    at_all_times,
    drop_labels,
    null_labels,
    sampled_scale,
)
from soflow_core.objectives.average_velocity import (
    DifferentialModel,
    Start,
    branch_means,
    differential_target,
    draw_pairs,
    leading_rows,
)
from soflow_core.objectives.base import (
    DEFAULT_POLICY,
    Batch,
    Draws,
    Loss,
    dropped_rows,
)
from soflow_core.passes import Head, Network, Passes, PassPolicy
from soflow_core.paths import linear
from soflow_core.random_source import RandomSource
from soflow_core.registration import register
from soflow_core.rows import choose_rows, row_mean, row_sum
from soflow_core.settings import check_share, check_weight_eps, setting
from soflow_core.times import LogitNormal, TimeDistribution


@register("improved_meanflow")
@dataclass(frozen=True)
class ImprovedMeanFlow(DifferentialModel):
    """Settings of improved MeanFlow; the defaults are its ImageNet recipe without guidance."""

    flow_matching_share: float = 0.5
    """Share of the batch with s = t, which is Flow Matching."""
    weight_power: float = 1.0
    """p of the weight 1 / (S + eps)^p, with S the sum of squares over a sample."""
    weight_eps: float = 0.01
    """eps of that weight."""
    time: TimeDistribution = field(default_factory=lambda: LogitNormal(-0.4, 1.0))
    """Distribution of both times; t is the larger."""
    guidance: IntervalGuidance = field(default_factory=IntervalGuidance)
    velocity_head: bool = setting(False, inert=True)
    """Whether the network's own velocity is predicted by a second head (`network.velocity_blocks`), which is trained beside u."""
    sampling_scale: float | None = setting(None, inert=True, sampling=True)
    """Guidance scale at sampling, of a network trained on a range of scales; None is the middle of that range."""
    sampling_interval: tuple[float, float] | None = setting(None, inert=True, sampling=True)
    """Guidance interval at sampling, of a network trained on intervals that vary; None is from the middle of each end's range."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("flow_matching_share", self.flow_matching_share)
        check_weight_eps(self.weight_eps)
        # Refuses a scale that is not trained.
        sampled_scale(self.guidance.scale, self.sampling_scale)
        self._check_sampling_interval()

    def _check_sampling_interval(self) -> None:
        if self.sampling_interval is None:
            return
        (first, last), start, end = self.sampling_interval, self.guidance.start, self.guidance.end
        if not isinstance(start, EndRange) or not isinstance(end, EndRange):
            raise ValueError(
                "sampling_interval is of a network trained on ranges of guidance.start and end; leave it out"
            )
        if not (start.holds(first) and end.holds(last)):
            raise ValueError(
                f"sampling_interval is {first} to {last}; the network is trained on starts from {start.low} to {start.high} and ends "
                f"from {end.low} to {end.high}"
            )

    @property
    def needs_null_label(self) -> bool:
        return self.guidance.drop > 0 or self.guidance.active

    @property
    def conditions_on_scale(self) -> bool:
        return isinstance(self.guidance.scale, ScaleRange)

    @property
    def conditions_on_interval(self) -> bool:
        return self.guidance.varies

    @property
    def sampled_interval(self) -> tuple[float, float] | None:
        start, end = self.guidance.start, self.guidance.end
        if not isinstance(start, EndRange) or not isinstance(end, EndRange):
            return None
        return self.sampling_interval or (start.middle, end.middle)

    @property
    def uses_velocity_head(self) -> bool:
        return self.velocity_head

    @property
    def trained_guidance(self) -> float | None:
        return sampled_scale(self.guidance.scale, self.sampling_scale)

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
        condition = self.guidance.draw(source, dropped, source.rows < velocity_rows)
        first = source.leading(velocity_rows)
        if not conditional:
            return Draws(noise, t, s, None, first)
        return Draws(noise, t, s, dropped, first, condition)

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
        start = Start(x_t, v_c, draws.t, draws.s, labels, draws.velocity_rows, draws.scale)
        prediction, head = self._predict(passes, start)
        with torch.no_grad():
            velocity, own = self._velocities(passes, start, dropped, prediction if head is None else head)
            # |u - target|^2 = |V - v_g|^2 with V = u + (t - s) sg(du/dt).
            target = differential_target(passes, start, velocity, self.total_derivative, own)
        squares = (prediction - target).square()
        loss, terms = self._weighted(squares), branch_means(draws, row_mean(squares))
        if head is not None:
            head_squares = (head - velocity).square()
            loss = loss + self._weighted(head_squares)
            terms["head_mse"] = row_mean(head_squares).detach().mean()
        return Loss(loss, terms)

    def _predict(self, passes: Passes, start: Start) -> tuple[Tensor, Tensor | None]:
        """-> u(x, t, s) and the second head's v(x, t, s), in one pass with gradient; None where the network has no such head."""
        arguments = start.x, start.t, start.s, start.labels, start.scale
        if not self.velocity_head:
            return passes.low_precision(*arguments), None
        u, v = passes.low_precision(*arguments, head="both").chunk(2, dim=1)
        return u, v

    def _weighted(self, squares: Tensor) -> Tensor:
        """(B, C, H, W) -> scalar: the mean of S / sg(S + eps)^p, S the sum over a sample."""
        total = row_sum(squares)
        return (total / (total.detach() + self.weight_eps) ** self.weight_power).mean()

    def _velocities(
        self, passes: Passes, start: Start, dropped: Tensor, prediction: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> v_g and v_p (B, C, H, W): the guided sample velocity, and the network's own, of the second head or u(x, t, t, y).

        One pass at s = t gives v_u where it is used, and v_p of the rows after `first`; that of the others is the prediction.
        Where intervals vary, these are asked for at all times: v_p at the scale that the row's interval leaves at its time.
        """
        first, count = start.first, len(start.x)
        guided = start.labels is not None and self.guidance.active
        # Rows whose label is dropped have v_p = v_u, and so v_g = v_c.
        inside = self.guidance.inside(start.t, start.scale) if guided else torch.zeros_like(dropped)
        use = inside & ~dropped
        x, t = start.x[first:], start.t[first:]
        rows = torch.ones_like(use[first:])
        labels = None if start.labels is None else start.labels[first:]
        scale = None if start.scale is None else self.guidance.of_velocity(start.scale, inside)[first:]
        if guided:
            assert labels is not None
            x, t = torch.cat([start.x, x]), torch.cat([start.t, t])
            rows, labels = torch.cat([use, rows]), torch.cat([null_labels(count, x.device), labels])
            if scale is not None:
                # The unconditional velocity is that of a scale of 1, as dropped rows train it.
                scale = torch.cat([at_all_times(torch.ones_like(start.t), scale), scale])
        needed = len(x) > 0 or passes.policy.uniform
        head: Head = "velocity" if self.velocity_head else "average"
        run = partial(passes.low_precision, head=head)
        velocities = passes.forward_where(run, rows, x, t, t, labels, scale) if needed else x
        own = torch.cat([prediction[:first].detach(), velocities[count:] if guided else velocities])
        if not guided:
            return start.velocity, own
        target = self.guidance.velocity(start.velocity, velocities[:count], own, start.scale)
        return choose_rows(use, target, start.velocity), own
