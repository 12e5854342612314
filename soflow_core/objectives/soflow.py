"""Solution Flow Models (SoFlow, arXiv 2512.15657): one network for a velocity and the solution f of its ODE.

The first `flow_matching_share` of a batch trains the velocity, df/ds at s = t. The rest trains f(x_t, t, s) to agree
with f(x_l, l, s), where x_l is one Euler step from x_t along the guided velocity of the sample, and l, `t_mid` in
code, lies between s and t. There is no Jacobian-vector product, and no teacher but the network itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from soflow_core.guidance import (
    Guidance,
    ScaleRange,
    draw_dropped,
    draw_scale,
    drop_labels,
    guided_velocity,
    mix_velocity,
    null_labels,
    sampled_scale,
)
from soflow_core.objectives.base import (
    DEFAULT_POLICY,
    Batch,
    Draws,
    Loss,
    dropped_rows,
    logged,
)
from soflow_core.objectives.solution_model import FlowMapModel
from soflow_core.parameterization import PARAMETERIZATIONS, Coefficients
from soflow_core.passes import Arguments, Network, Passes, PassPolicy
from soflow_core.paths import PATHS, PathPoint
from soflow_core.random_source import RandomSource
from soflow_core.registration import part_setting, register
from soflow_core.rows import choose_rows, per_row, row_mean
from soflow_core.settings import STRICT, check_share, check_values, check_weight_eps, setting
from soflow_core.times import LogitNormal, RatioSchedule, TimeDistribution, consistency_times, middle_time


@dataclass(frozen=True)
class SoFlowTimes:
    """Distributions of the times of SoFlow's two branches."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    velocity: TimeDistribution = field(default_factory=lambda: LogitNormal(-0.2, 1.0))
    """t of the Flow Matching branch."""
    start: TimeDistribution = field(default_factory=lambda: LogitNormal(0.2, 0.8))
    """t of the consistency branch."""
    end: TimeDistribution = field(default_factory=lambda: LogitNormal(-1.0, 0.8))
    """s of the consistency branch."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class BranchLoss:
    """Rows of one branch, each (B,): differentiable loss, detached mean squared error, and detached weight."""

    loss: Tensor
    mse: Tensor
    weight: Tensor


@register("soflow")
@dataclass(frozen=True)
class SoFlow(FlowMapModel):
    """Settings of SoFlow; the defaults are the paper's ImageNet 256 recipe."""

    flow_matching_share: float = 0.75
    """lambda: share of the batch in the Flow Matching branch."""
    weight_power: float = 1.0
    """p of the weight 1 / (mse + eps)^p; 0 is the plain squared error."""
    weight_eps: float = 0.01
    """eps of that weight."""
    path: str = part_setting(PATHS, "linear")
    """A registered path."""
    parameterization: str = part_setting(PARAMETERIZATIONS, "euler")
    """A registered parameterization of f by the network."""
    times: SoFlowTimes = field(default_factory=SoFlowTimes)
    guidance: Guidance = field(default_factory=Guidance)
    schedule: RatioSchedule = field(default_factory=RatioSchedule)
    """The middle-time ratio r(k, K)."""
    sampling_scale: float | None = setting(None, inert=True, sampling=True)
    """Guidance scale at sampling, of a network trained on a range of scales; None is the middle of that range."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("flow_matching_share", self.flow_matching_share)
        if self.weight_power < 0:
            raise ValueError(
                f"weight_power is {self.weight_power}; give 0 for the plain squared error, or more"
            )
        check_weight_eps(self.weight_eps)
        # Refuses a scale that is not trained.
        sampled_scale(self.guidance.scale, self.sampling_scale)

    @property
    def needs_null_label(self) -> bool:
        return self.guidance.active

    @property
    def conditions_on_scale(self) -> bool:
        return isinstance(self.guidance.scale, ScaleRange)

    @property
    def trained_guidance(self) -> float | None:
        return sampled_scale(self.guidance.scale, self.sampling_scale)

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        """a(t, s) and b(t, s) of f = a x + b F."""
        return PARAMETERIZATIONS.named(self.parameterization)(t, s)

    def solution(self, network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """f(x, t, s): (B, C, H, W), (B,), (B,), (B,) -> (B, C, H, W)."""
        return self.coefficients(t, s).solution(x, network(x, t, s, labels))

    @property
    def noising_path(self) -> Callable[[Tensor], PathPoint]:
        return PATHS.named(self.path)

    def velocity(self, network: Network, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """v(x, t): (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
        return self.coefficients(t, t).velocity(x, network(x, t, t, labels))

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        return {"middle_ratio": self.schedule.ratio(step, total_steps)}

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        velocity_rows = int(self.flow_matching_share * source.batch_size)
        noise = source.normal(*sample_shape)
        velocity_time = self.times.velocity.from_normal(source.normal())
        start = self.times.start.from_normal(source.normal())
        end = self.times.end.from_normal(source.normal())
        t, s = consistency_times(start, end)
        in_velocity_branch = source.rows < velocity_rows
        dropped = draw_dropped(source, self.guidance.drop)
        scale = draw_scale(self.guidance.scale, source, dropped)
        return Draws(
            noise=noise,
            t=torch.where(in_velocity_branch, velocity_time, t),
            s=torch.where(in_velocity_branch, velocity_time, s),
            dropped=dropped if conditional and self.guidance.active else None,
            velocity_rows=source.leading(velocity_rows),
            scale=scale if conditional else None,
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
        passes = Passes(network, policy)
        first = draws.velocity_rows
        t, s, labels = draws.t, draws.s, batch.labels
        path = PATHS.named(self.path)(t)
        x_t = path.state(batch.x0, draws.noise)
        target = path.velocity(batch.x0, draws.noise)
        mixed_rows = None
        if labels is not None and self.guidance.active:
            dropped = dropped_rows(draws)
            target = self._guide(passes, x_t, target, labels, draws, dropped)
            labels = drop_labels(labels, dropped)
            mixed_rows = ~dropped[:first]
        scale = draws.scale
        prediction = self._predict(passes, (x_t, t, s, labels), scale, first)

        velocity = self._velocity_branch(
            prediction[:first], x_t[:first], t[:first], target[:first], mixed_rows
        )
        ratio = self.scheduled(policy, step, total_steps)["middle_ratio"]
        consistency = self._consistency_branch(
            passes,
            prediction[first:],
            x_t[first:],
            (t[first:], s[first:]),
            target[first:],
            (None if labels is None else labels[first:], None if scale is None else scale[first:]),
            ratio,
        )
        terms = {"middle_ratio": logged(ratio, t.device)}
        for name, branch in (("velocity", velocity), ("consistency", consistency)):
            if len(branch.loss):
                terms[f"{name}_loss"] = branch.loss.detach().mean()
                terms[f"{name}_mse"] = branch.mse.mean()
                terms[f"{name}_weight"] = branch.weight.mean()
        # Branches are weighted by their rows: L = L_v B_v / B + L_c (B - B_v) / B.
        return Loss(torch.cat([velocity.loss, consistency.loss]).mean(), terms)

    def _guide(
        self, passes: Passes, x_t: Tensor, v_c: Tensor, labels: Tensor, draws: Draws, dropped: Tensor
    ) -> Tensor:
        """-> (B, C, H, W): guided velocity v_g; in consistency rows mixed with the predicted velocity v_p.

        One pass without gradient gives v_u for all rows and v_p for the consistency rows. Dropped rows need neither.
        """
        first = draws.velocity_rows if self.guidance.mix < 1 else len(x_t)
        x = torch.cat([x_t, x_t[first:]])
        t = torch.cat([draws.t, draws.t[first:]])
        y = torch.cat([null_labels(len(x_t), x.device), labels[first:]])
        use = ~torch.cat([dropped, dropped[first:]])
        scale = None
        if draws.scale is not None:
            # The unconditional velocity is that of a scale of 1, as dropped rows train it.
            scale = torch.cat([torch.ones_like(draws.scale), draws.scale[first:]])
        predicted = passes.forward_where(passes.low_precision, use, x, t, t, y, scale)
        v = self.coefficients(t, t).velocity(x, predicted)
        strength = self.guidance.strength(draws.t, draws.scale)
        guided = guided_velocity(v_c, v[: len(x_t)], strength)
        if first < len(x_t):
            guided = torch.cat(
                [guided[:first], mix_velocity(guided[first:], v[len(x_t) :], self.guidance.mix)]
            )
        return choose_rows(dropped, v_c, guided)

    def _predict(self, passes: Passes, inputs: Arguments, scale: Tensor | None, first: int) -> Tensor:
        """-> (B, C, H, W): F with gradient, in one pass, or in two where the branches differ in precision."""
        x, t, s, labels = inputs
        uniform = passes.policy.uniform
        if first == len(x) and not uniform:
            return passes.low_precision(x, t, s, labels, scale)
        alike = passes.policy.precision != "mixed" and not passes.policy.separate
        if alike or (first == 0 and not uniform):
            return passes.high_precision(x, t, s, labels, scale)
        head, tail = (None, None) if labels is None else (labels[:first], labels[first:])
        head_scale, tail_scale = (None, None) if scale is None else (scale[:first], scale[first:])
        velocity = passes.low_precision(x[:first], t[:first], s[:first], head, head_scale)
        rest = passes.high_precision(x[first:], t[first:], s[first:], tail, tail_scale)
        return torch.cat([velocity, rest])

    def _velocity_branch(
        self, prediction: Tensor, x_t: Tensor, t: Tensor, target: Tensor, mixed_rows: Tensor | None
    ) -> BranchLoss:
        """Flow Matching: |v_p - v_g|^2, weighted by 1 / (|b_s| (mse + eps)^p).

        In `mixed_rows` (B,) the target is m v_g + (1 - m) sg(v_p), which scales the gradient by m and keeps the
        minimum.
        """
        coefficients = self.coefficients(t, t)
        v_p = coefficients.velocity(x_t, prediction)
        if mixed_rows is not None:
            target = choose_rows(mixed_rows, mix_velocity(target, v_p, self.guidance.mix), target)
        mse = row_mean((v_p - target).square())
        weight = self._weight(mse.detach()) / coefficients.db_ds.abs()
        return BranchLoss(weight * mse, mse.detach(), weight)

    def _consistency_branch(
        self,
        passes: Passes,
        prediction: Tensor,
        x_t: Tensor,
        times: tuple[Tensor, Tensor],
        velocity: Tensor,
        condition: tuple[Tensor | None, Tensor | None],
        ratio: float | Tensor,
    ) -> BranchLoss:
        """sgn(b) <F_t, q> W / D with q = (f_t - f_l) / (t - l), l = t_mid.

        Its gradient is that of W |f_t - sg f_l|^2 / (2 D |b| (t - l)). `condition` is the labels and guidance scales.
        """
        (t, s), (labels, scale) = times, condition
        t_mid = middle_time(t, s, ratio)
        start, middle = self.coefficients(t, s), self.coefficients(t_mid, s)
        with torch.no_grad():
            x_mid = x_t + per_row(t_mid - t, x_t) * velocity
            # Where s = t_mid, b(t_mid, s) = 0 and the prediction there does not matter.
            mid_prediction = passes.forward_where(
                passes.high_precision, t_mid > s, x_mid, t_mid, s, labels, scale
            )
            f_mid = middle.solution(x_mid, mid_prediction)
            f_t = start.solution(x_t, prediction)
            quotient = (f_t - f_mid) / per_row(t - t_mid, x_t)
            mse = row_mean(quotient.square())
            weight = self._weight(mse)
        inner = row_mean(prediction * quotient * per_row(weight, quotient))
        return BranchLoss(torch.sign(start.b) * inner, mse, weight)

    def _weight(self, mse: Tensor) -> Tensor:
        """(B,) -> (B,): 1 / (mse + eps)^p."""
        return (mse + self.weight_eps) ** -self.weight_power
