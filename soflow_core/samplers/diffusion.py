"""Diffusion samplers with a noise prediction: DDPM (arXiv 2006.11239) and DDIM (arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soflow_core.registration import register
from soflow_core.samplers.base import NoiseSampler, PredictNoise


@register("ddim")
@dataclass(frozen=True)
class Ddim(NoiseSampler):
    """Deterministic, along the chain's probability flow."""

    def sample(
        self, predict: PredictNoise, noise: Tensor, alpha_bar: Tensor, steps: int, renoise: Sequence[Tensor]
    ) -> Tensor:
        del renoise
        return ddim(predict, noise, alpha_bar, steps)


@register("ddpm")
@dataclass(frozen=True)
class Ddpm(NoiseSampler):
    """Samples of the posterior of the respaced chain."""

    def sample(
        self, predict: PredictNoise, noise: Tensor, alpha_bar: Tensor, steps: int, renoise: Sequence[Tensor]
    ) -> Tensor:
        return ddpm(predict, noise, alpha_bar, steps, renoise)


def linear_alpha_bar(steps: int, beta_first: float, beta_last: float) -> Tensor:
    """-> (T,) float64: the product of 1 - beta up to each step, with beta linear (DDPM, section 4)."""
    betas = torch.linspace(beta_first, beta_last, steps, dtype=torch.float64)
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


@torch.no_grad()
def ddim(predict: PredictNoise, noise: Tensor, alpha_bar: Tensor, steps: int) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): x' = sqrt(abar') x0 + sqrt(1 - abar') eps (DDIM, Eq. 12, sigma = 0)."""
    x, numbers = noise, respaced(len(alpha_bar), steps)
    for now, following in zip(numbers, [*numbers[1:], None], strict=True):
        eps = predict(x, torch.full((x.shape[0],), float(now), device=x.device))
        x0 = predicted_data(x, eps, float(alpha_bar[now]))
        abar_next = 1.0 if following is None else float(alpha_bar[following])
        x = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps
    return x


@torch.no_grad()
def ddpm(
    predict: PredictNoise, noise: Tensor, alpha_bar: Tensor, steps: int, renoise: Sequence[Tensor]
) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W): samples of the posterior q(x' | x, x0) of the respaced chain (DDPM, Eqs. 6, 7).

    renoise[i] is the noise added after step i; none is added after the last. Raises ValueError for too few.
    """
    if len(renoise) < steps - 1:
        raise ValueError(f"{steps} steps need {steps - 1} noises in renoise; {len(renoise)} were given")
    x, numbers = noise, respaced(len(alpha_bar), steps)
    for i, now in enumerate(numbers):
        eps = predict(x, torch.full((x.shape[0],), float(now), device=x.device))
        abar = float(alpha_bar[now])
        x0 = predicted_data(x, eps, abar)
        if i == steps - 1:
            return x0
        abar_next = float(alpha_bar[numbers[i + 1]])
        beta = 1 - abar / abar_next
        mean = abar_next**0.5 * beta / (1 - abar) * x0 + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x
        x = mean + ((1 - abar_next) / (1 - abar) * beta) ** 0.5 * renoise[i]
    return x
