"""Diffusion samplers with a noise prediction: DDPM (arXiv 2006.11239) and DDIM (arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_core.registration import register
from soflow_core.samplers.base import Fresh, NoiseSampler, PredictNoise, at_time


@register("ddim")
@dataclass(frozen=True)
class Ddim(NoiseSampler):
    """Deterministic, along the chain's probability flow."""

    def step(
        self, predict: PredictNoise, x: Tensor, number: int, shares: tuple[float, float], fresh: Fresh
    ) -> Tensor:
        """sqrt(abar') x0 + sqrt(1 - abar') eps (DDIM, Eq. 12, sigma = 0)."""
        del fresh
        here, there = shares
        eps = predict(x, at_time(x, float(number)))
        return there**0.5 * predicted_data(x, eps, here) + (1 - there) ** 0.5 * eps

    def evaluations(self, steps: int) -> int:
        return steps


@register("ddpm")
@dataclass(frozen=True)
class Ddpm(NoiseSampler):
    """Samples of the posterior of the respaced chain."""

    def step(
        self, predict: PredictNoise, x: Tensor, number: int, shares: tuple[float, float], fresh: Fresh
    ) -> Tensor:
        """A sample of q(x' | x, x0) (DDPM, Eqs. 6, 7), and x0 at the end, where no noise is added."""
        abar, abar_next = shares
        x0 = predicted_data(x, predict(x, at_time(x, float(number))), abar)
        if abar_next == 1:
            return x0
        beta = 1 - abar / abar_next
        mean = abar_next**0.5 * beta / (1 - abar) * x0 + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x
        return mean + ((1 - abar_next) / (1 - abar) * beta) ** 0.5 * fresh()

    def evaluations(self, steps: int) -> int:
        return steps


def linear_alpha_bar(
    steps: int, beta_first: float, beta_last: float, device: torch.device | None = None
) -> Tensor:
    """-> (T,) float64: the product of 1 - beta up to each step, with beta linear (DDPM, section 4)."""
    betas = torch.linspace(beta_first, beta_last, steps, dtype=torch.float64, device=device)
    return torch.cumprod(1 - betas, dim=0)


def respaced(total: int, steps: int) -> list[int]:
    """Evenly spaced step numbers from total - 1 down to 0; only total - 1 for one step."""
    if not 1 <= steps <= total:
        raise ValueError(f"{steps} sampling steps of a diffusion of {total}; give 1 to {total}")
    if steps == 1:
        return [total - 1]
    return [round(i * (total - 1) / (steps - 1)) for i in reversed(range(steps))]


def predicted_data(x: Tensor, noise: Tensor, alpha_bar: float) -> Tensor:
    """(B, C, H, W) x 2 -> (B, C, H, W): x0 = (x - sqrt(1 - abar) eps) / sqrt(abar) (DDPM, Eq. 15)."""
    return (x - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5


def numbers_at(total: int, times: Sequence[float]) -> list[int]:
    """Step numbers of a diffusion of `total` at times that fall from 1 to 0, but at 0, the end. Raises ValueError for repeats."""
    numbers = [round(time * (total - 1)) for time in times[:-1]]
    if len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{len(numbers)} sampling steps fall on {len(set(numbers))} of {total} step numbers; take fewer steps"
        )
    return numbers
