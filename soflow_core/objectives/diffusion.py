"""Denoising diffusion (DDPM, arXiv 2006.11239) with DiT's settings (arXiv 2212.09748) and fixed variances.

The network predicts the noise. Step numbers 0 to 999 enter the time embedding as they are; the second time
equals the first.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from soflow_core.guidance import draw_dropped, drop_labels
from soflow_core.objectives.base import (
    DEFAULT_POLICY,
    Batch,
    Draws,
    Loss,
    dropped_rows,
)
from soflow_core.objectives.step_times import SteppedModel
from soflow_core.passes import Network, Passes, PassPolicy
from soflow_core.random_source import RandomSource
from soflow_core.registration import register
from soflow_core.rows import per_row, row_mean
from soflow_core.samplers.base import NoiseSampler, check_sampler, sampler
from soflow_core.samplers.diffusion import linear_alpha_bar, numbers_at, respaced
from soflow_core.samplers.ode import guided_prediction
from soflow_core.settings import check_drop, setting

MOST_STEPS = 100_000
"""Of a diffusion; the variance that each adds is a number in a table."""


@register("diffusion")
@dataclass(frozen=True)
class Diffusion(SteppedModel):
    """Settings of diffusion; the defaults are DiT's."""

    fixed_settings: ClassVar[frozenset[str]] = frozenset({"beta_first", "beta_last"})

    diffusion_steps: int = 1000
    """Length of the chain."""
    beta_first: float = 1e-4
    """Variance added at the first step."""
    beta_last: float = 2e-2
    """Variance added at the last step."""
    drop: float = 0.1
    """Probability that a sample's label is replaced by the null label, for guidance at sampling."""
    sampler: str = setting("ddim", sampling=True)
    sampling_scale: float = setting(1.0, sampling=True)
    """Guidance scale at sampling; 1 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.diffusion_steps <= MOST_STEPS:
            raise ValueError(f"diffusion_steps is {self.diffusion_steps}; give 1 to {MOST_STEPS:,}")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise ValueError(
                f"betas from {self.beta_first} to {self.beta_last}; give 0 < beta_first <= beta_last < 1"
            )
        check_drop("drop", self.drop)
        check_sampler(self, NoiseSampler, self.sampler)  # type: ignore[type-abstract]
        if self.sampling_scale != 1 and self.drop == 0:
            raise ValueError(
                "sampling_scale needs an unconditional prediction; set drop above 0 or sampling_scale to 1"
            )

    @property
    def needs_null_label(self) -> bool:
        return self.drop > 0

    def alpha_bar(self, device: torch.device | None = None) -> Tensor:
        """(T,) float64: share of the data's variance left after each step."""
        return linear_alpha_bar(self.diffusion_steps, self.beta_first, self.beta_last, device)

    @property
    def used_sampler(self) -> NoiseSampler:
        return sampler(NoiseSampler, self.sampler)  # type: ignore[type-abstract]

    def phase(self, step: int, total_steps: int) -> Hashable:
        del step, total_steps
        return None

    def schedules(self, step: int, total_steps: int) -> Mapping[str, float]:
        del step, total_steps
        return {}

    def draw_from(self, source: RandomSource, sample_shape: tuple[int, ...], conditional: bool) -> Draws:
        noise = source.normal(*sample_shape)
        number = source.integers(self.diffusion_steps).float()
        dropped = draw_dropped(source, self.drop)
        return Draws(noise, number, number, dropped if conditional else None, velocity_rows=len(source.rows))

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
        alpha_bar = self.alpha_bar(draws.t.device)[draws.t.long()]
        signal, noise = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        x = per_row(signal, batch.x0) * batch.x0 + per_row(noise, batch.x0) * draws.noise
        labels = None if batch.labels is None else drop_labels(batch.labels, dropped_rows(draws))
        prediction = Passes(network, policy).low_precision(x, draws.t, draws.t, labels)
        # L_simple (DDPM, Eq. 14).
        mse = row_mean((prediction - draws.noise).square()).mean()
        return Loss(mse, {"noise_mse": mse.detach()})

    def sample(
        self,
        network: Network,
        noise: Tensor,
        labels: Tensor | None,
        steps: int,
        renoise: Sequence[Tensor] = (),
    ) -> Tensor:
        def predict(x: Tensor, number: Tensor) -> Tensor:
            return guided_prediction(network, x, number, labels, self.sampling_scale)

        times = self.set_times(steps)
        total = self.diffusion_steps
        numbers = respaced(total, steps) if times is None else numbers_at(total, times)
        return self.used_sampler.sample(predict, noise, self.alpha_bar(), numbers, renoise)
