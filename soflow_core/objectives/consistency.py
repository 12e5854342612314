"""Consistency models (iCT, ECT, sCM) on the linear path: f(x, t) = x - t F(x, t, 0), which is x at t = 0.

The papers' noise level is sigma = t / (1 - t), so that ln sigma is the logit of t. The points at two times of the same
data and noise are one step along the sample's velocity apart. None of these methods learns a velocity field, so none
has guidance in training.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from soflow_core.objectives.base import DEFAULT_POLICY, Batch, Draws, Loss, logged
from soflow_core.objectives.solution_model import SolutionModel
from soflow_core.objectives.total_derivative import DerivativeModel
from soflow_core.passes import Network, Passes, PassPolicy
from soflow_core.paths import linear
from soflow_core.random_source import RandomSource
from soflow_core.registration import register
from soflow_core.rows import per_row, row_mean, row_sum
from soflow_core.times import LogitNormal, TimeDistribution

MOST_LEVELS = 2**20
"""Of a grid of noise levels, which is a tensor."""
MOST_STAGES = 10_000
LEAST_SHARE = 2.0**-24
"""Of a noise level, by which another is below it in float32: 1 less half of that is 1."""


def consistency_function(network: Network, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """f(x, t) = x - t F(x, t, 0): (B, C, H, W), (B,), (B,) -> (B, C, H, W)."""
    return x - per_row(t, x) * network(x, t, torch.zeros_like(t), labels)


class ConsistencyModel(SolutionModel):
    """Base class of the three methods: draws without dropped labels and velocity rows, and the sampler."""

    time: TimeDistribution

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        del conditional
        noise = source.normal(*sample_shape)
        t = self.draw_time(source)
        return Draws(noise, t, torch.zeros_like(t), None, velocity_rows=0)

    def draw_time(self, source: RandomSource) -> Tensor:
        """-> (n,): a time for each row."""
        return self.time.from_normal(source.normal())

    def solution(self, network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        del s
        return consistency_function(network, x, t, labels)


def discrete_loss(
    passes: Passes, batch: Batch, noise: Tensor, sigmas: tuple[Tensor, Tensor], huber: float
) -> Loss:
    """Loss (sqrt(|f_t - sg f_l|^2 + c^2) - c) / (sigma_t - sigma_l) of the same data and noise at two levels (B,).

    The pseudo-Huber distance and the weight are iCT's (arXiv 2310.14189, Eqs. 6 and 7).
    """
    times = [sigma / (1 + sigma) for sigma in sigmas]
    points = [linear(t).state(batch.x0, noise) for t in times]
    f_t = consistency_function(passes.high_precision, points[0], times[0], batch.labels)
    with torch.no_grad():
        # At t = 0 the function is its argument, for any prediction.
        later = passes.forward_where(
            passes.high_precision, times[1] > 0, points[1], times[1], torch.zeros_like(times[1]), batch.labels
        )
        f_l = points[1] - per_row(times[1], later) * later
    difference = f_t - f_l
    if huber:
        distance = (row_sum(difference.square()) + huber**2).sqrt() - huber
    else:
        distance = torch.linalg.vector_norm(difference.flatten(1), dim=1)
    loss = (distance / (sigmas[0] - sigmas[1])).mean()
    return Loss(loss, {"consistency_mse": row_mean(difference.detach().square()).mean()})


@register("ict")
@dataclass(frozen=True)
class ImprovedConsistency(ConsistencyModel):
    """Settings of iCT (arXiv 2310.14189): neighbouring noise levels of a grid that doubles in stages."""

    fixed_settings: ClassVar[frozenset[str]] = frozenset({"sigma_min", "sigma_max", "rho"})

    time: LogitNormal = field(default_factory=lambda: LogitNormal(-1.1, 2.0))
    """Distribution of the noise level: mean and std of ln sigma."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    """Curvature of the grid (EDM, arXiv 2206.00364, Eq. 5)."""
    first_levels: int = 10
    """Intervals of the grid at the start."""
    last_levels: int = 1280
    """Intervals of the grid at the end."""
    huber: float = 0.00054
    """c of the pseudo-Huber distance, times the square root of the number of elements of a sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"noise levels {self.sigma_min} to {self.sigma_max}; give 0 < sigma_min < sigma_max"
            )
        if not 2 <= self.first_levels <= self.last_levels <= MOST_LEVELS:
            raise ValueError(
                f"levels {self.first_levels} to {self.last_levels}; give 2 <= first_levels <= last_levels, up to {MOST_LEVELS:,}"
            )
        if self.rho <= 0:
            raise ValueError(f"rho is {self.rho}; the curvature of the grid must be above 0")
        if self.huber < 0:
            raise ValueError(f"huber is {self.huber}; give 0 for the distance itself, or more")

    def levels(self, step: int, total_steps: int) -> int:
        """N(k) = min(s_0 2^floor(k / K'), s_1) + 1, K' = floor(K / (log2(s_1 / s_0) + 1)) (iCT, Eq. 9)."""
        stage = max(1, int(total_steps / (math.log2(self.last_levels / self.first_levels) + 1)))
        return min(self.first_levels * 2 ** (step // stage), self.last_levels) + 1

    def grid(self, count: int, device: torch.device | None = None) -> Tensor:
        """-> (count,) float32: noise levels from sigma_min up to sigma_max (EDM, Eq. 5)."""
        share = torch.linspace(0, 1, count, dtype=torch.float64, device=device)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((low + share * (high - low)) ** self.rho).float()

    def draw_time(self, source: RandomSource) -> Tensor:
        """-> (n,): logit-normal times, truncated to the grid's range.

        Rounded down to the grid of a step, they have the distribution of levels of iCT's Eq. 10.
        """
        uniform = source.uniform(torch.float64)
        bounds = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64).log()
        low, high = torch.special.ndtr((bounds - self.time.mean) / self.time.std)
        return self.time.from_normal(torch.special.ndtri(low + uniform * (high - low))).float()

    def phase(self, step: int, total_steps: int) -> Hashable:
        return self.levels(step, total_steps)

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        del step, total_steps
        return {}

    def loss(
        self,
        network: Network,
        batch: Batch,
        draws: Draws,
        step: int,
        total_steps: int,
        policy: PassPolicy = DEFAULT_POLICY,
    ) -> Loss:
        grid = self.grid(self.levels(step, total_steps), draws.t.device)
        sigma = draws.t / (1 - draws.t)
        upper = torch.searchsorted(grid, sigma, right=True).clamp(1, len(grid) - 1)
        huber = self.huber * math.sqrt(batch.x0[0].numel())
        result = discrete_loss(
            Passes(network, policy), batch, draws.noise, (grid[upper], grid[upper - 1]), huber
        )
        result.terms["levels"] = logged(float(len(grid)), draws.t.device)
        return result


@register("ect")
@dataclass(frozen=True)
class EasyConsistency(ConsistencyModel):
    """Settings of ECT (arXiv 2406.14548): the second noise level rises from 0 towards the first during training."""

    time: TimeDistribution = field(default_factory=lambda: LogitNormal(-1.1, 2.0))
    """Distribution of t; of a logit-normal one, mean and std of ln sigma."""
    quotient: float = 2.0
    """q: the gap between the levels shrinks q-fold from stage to stage."""
    stages: int = 8
    """Stages of equal length over training."""
    offset: float = 8.0
    """Factor of the sigmoid that widens the gap at low noise."""
    huber: float = 0.0
    """c of the distance sqrt(|d|^2 + c^2) - c; 0 is the plain norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quotient <= 1:
            raise ValueError(f"quotient is {self.quotient}; the gap shrinks by it, so it must be above 1")
        if not 1 <= self.stages <= MOST_STAGES:
            raise ValueError(f"stages is {self.stages}; give 1 to {MOST_STAGES:,}")
        if self.offset < 0:
            raise ValueError(f"offset is {self.offset}; the gap is widened by it, so give 0 or more")
        if self.quotient**-self.stages < LEAST_SHARE:
            raise ValueError(
                f"a gap that shrinks {self.quotient:g}-fold in each of {self.stages} stages ends below what float32 tells from none: "
                "give fewer stages, or a smaller quotient"
            )
        if self.huber < 0:
            raise ValueError(f"huber is {self.huber}; give 0 for the distance itself, or more")

    def gap(self, step: int, total_steps: int) -> float:
        """q^-(a + 1) in stage a."""
        stage = min(step * self.stages // total_steps, self.stages - 1)
        return self.quotient ** -(stage + 1)

    def second_level(self, sigma: Tensor, gap: float | Tensor) -> Tensor:
        """(B,) -> (B,): sigma (1 - gap (1 + offset sigmoid(-sigma))), at least 0 (official code)."""
        share = gap * (1 + self.offset * torch.sigmoid(-sigma))
        return (sigma * (1 - share)).clamp(min=0)

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        return {"gap": self.gap(step, total_steps)}

    def loss(
        self,
        network: Network,
        batch: Batch,
        draws: Draws,
        step: int,
        total_steps: int,
        policy: PassPolicy = DEFAULT_POLICY,
    ) -> Loss:
        sigma = draws.t / (1 - draws.t)
        second = self.second_level(sigma, self.scheduled(policy, step, total_steps)["gap"])
        return discrete_loss(Passes(network, policy), batch, draws.noise, (sigma, second), self.huber)


@register("scm")
@dataclass(frozen=True)
class ContinuousConsistency(DerivativeModel, ConsistencyModel):
    """Settings of sCM (arXiv 2410.11081) on the linear path: the limit of equal times, with a normalized tangent.

    Where f is constant along the sample's velocity, v_c - F - t dF/dt is 0. The paper's learned weight of each time is
    left out.
    """

    time: TimeDistribution = field(default_factory=lambda: LogitNormal(-1.0, 1.4))
    """Distribution of t; of a logit-normal one, mean and std of ln sigma."""
    warmup_steps: int = 10_000
    """Steps over which the factor of the derivative in the tangent grows from 0, which is Flow Matching, to 1."""
    tangent_eps: float = 0.1
    """c of the normalization g / (rms(g) + c)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; give 0 or more")
        if self.tangent_eps <= 0:
            raise ValueError(f"tangent_eps is {self.tangent_eps}; it must be above 0")

    @property
    def uses_jvp(self) -> bool:
        return self.derivative == "jvp"

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        del total_steps
        return {"warmup": min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0}

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
        t, zero = draws.t, torch.zeros_like(draws.t)
        path = linear(t)
        x_t, v_c = path.state(batch.x0, draws.noise), path.velocity(batch.x0, draws.noise)
        prediction = passes.low_precision(x_t, t, zero, batch.labels)
        derivative = self.total_derivative(passes, (x_t, t, zero, batch.labels), v_c)
        warmup = self.scheduled(policy, step, total_steps)["warmup"]
        tangent = (v_c - prediction.detach()) - warmup * per_row(t, x_t) * derivative
        size = row_mean(tangent.square()).sqrt()
        normalized = tangent / per_row(size + self.tangent_eps, tangent)
        # The gradient of |F - sg F - g|^2 is that of -2 <F, g>; its value is |g|^2.
        mse = row_mean((prediction - prediction.detach() - normalized).square()).mean()
        return Loss(mse, {"tangent_mse": size.square().mean(), "warmup": logged(warmup, t.device)})
