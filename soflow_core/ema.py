"""Averages of parameters over training: exponential, and power-function EMAs (EDM2, arXiv 2312.02696, section 3).

`posthoc_weights` and `combine` reconstruct a power-function EMA of any width from stored ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from soflow_core.sharding import local, split_like


@dataclass(frozen=True)
class Exponential:
    """Exponential average: average <- decay average + (1 - decay) parameters, from the initial parameters on."""

    decay: float

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"an EMA decay of {self.decay} is not in 0 to below 1")

    @property
    def name(self) -> str:
        return f"{self.decay:g}" if float(f"{self.decay:g}") == self.decay else repr(self.decay)

    def keep(self, step: int) -> float:
        """Factor of the previous average in the step-th update, counted from 1."""
        del step
        return self.decay

    def keep_over(self, step: int, count: int) -> float:
        """Factor of the previous average in an update at this step that stands for the last `count` steps."""
        del step
        return float(self.decay**count)


@dataclass(frozen=True)
class Power:
    """Average weighted by the gamma-th power of the step; sigma_rel is the width relative to the training length."""

    sigma_rel: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < 0.28:
            raise ValueError(f"a power-function EMA width of {self.sigma_rel} is not above 0 and below 0.28")

    @property
    def name(self) -> str:
        return f"power-{self.sigma_rel:g}"

    @cached_property
    def gamma(self) -> float:
        """Solution of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, Eq. 126), by bisection."""
        low, high = 0.0, 1.0
        while _relative_width(high) > self.sigma_rel:
            high *= 2
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if _relative_width(middle) > self.sigma_rel else (low, middle)
        return (low + high) / 2

    def keep(self, step: int) -> float:
        """beta(k) = (1 - 1/k)^(gamma + 1) (EDM2, Eq. 127); 0 at the first update."""
        return float((1 - 1 / step) ** (self.gamma + 1))

    def keep_over(self, step: int, count: int) -> float:
        """The product of `keep` over the last `count` steps."""
        return float((1 - count / step) ** (self.gamma + 1))


def _relative_width(gamma: float) -> float:
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


class EMA:
    """Averages of one set of named parameters, in float32; split over ranks where the parameters are.

    With `every` above 1 they are updated at each step that it divides, with the factors of that many steps, and in float64: the many
    small differences of a decay near 1 are then added without rounding each of them.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        decays: Sequence[float] = (),
        power_widths: Sequence[float] = (),
        every: int = 1,
    ) -> None:
        self.every = every
        self.kinds: list[Exponential | Power] = [Exponential(d) for d in decays]
        self.kinds += [Power(w) for w in power_widths]
        self.averages: dict[str, dict[str, Tensor]] = {
            kind.name: {name: p.detach().float().clone() for name, p in parameters.items()}
            for kind in self.kinds
        }
        if len(self.averages) != len(self.kinds):
            raise ValueError("the same EMA was asked for twice; give each decay once")

    def update(self, parameters: Iterable[Tensor], step: int, left_out: Tensor | None = None) -> None:
        """Adds the parameters after the step-th step (counted from 1), in the order of the constructor's mapping.

        Where `left_out`, a number on the device, is 1, nothing changes: the parameters must then be those of the step before.
        """
        if self.every == 1:
            self.add(parameters, self.weights(step), left_out)
        elif self.kinds and step % self.every == 0:
            self._update_precisely(parameters, step, left_out)

    def weights(self, step: int) -> dict[str, float]:
        """Average name -> weight of the parameters after the step-th step in it, where averages are updated each step."""
        return {kind.name: 1 - kind.keep(step) for kind in self.kinds}

    @torch.no_grad()
    def add(
        self,
        parameters: Iterable[Tensor],
        weights: Mapping[str, float | Tensor],
        left_out: Tensor | None = None,
    ) -> None:
        """`update` with the weights of one step, as numbers or, beside `left_out`, as () tensors on the device."""
        if not self.kinds:
            return
        current = [local(p).float() for p in parameters]
        for name, weight in weights.items():
            averages = [local(average) for average in self.averages[name].values()]
            if left_out is None:
                torch._foreach_lerp_(averages, current, float(weight))
            else:
                torch._foreach_lerp_(averages, current, [weight * (1 - left_out)] * len(averages))

    @torch.no_grad()
    def _update_precisely(self, parameters: Iterable[Tensor], step: int, left_out: Tensor | None) -> None:
        """The update that stands for the last `every` steps, one tensor after the other in float64."""
        shares = [kind.keep_over(step, self.every) for kind in self.kinds]
        places = zip(*(self.averages[kind.name].values() for kind in self.kinds), strict=True)
        for parameter, averages in zip(parameters, places, strict=True):
            current = local(parameter).double()
            for keep, average in zip(shares, averages, strict=True):
                kept = local(average)
                weight = 1 - keep if left_out is None else (1 - keep) * (1 - left_out.double())
                kept.copy_(kept.double().lerp_(current, weight))

    def average(self, name: str | None = None) -> dict[str, Tensor]:
        """The average with this name, by default the first. Raises KeyError where there is none."""
        if name is None:
            name = next(iter(self.averages), None)
        if name is None or name not in self.averages:
            raise KeyError(f"there is no EMA {name}; there are: {', '.join(self.averages) or 'none'}")
        return self.averages[name]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Average name -> parameter name -> tensor."""
        return self.averages

    def check(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Raises ValueError where a state holds other averages than these."""
        if set(state) != set(self.averages):
            raise ValueError(
                f"the state has the EMAs {sorted(state)} and this training keeps {sorted(self.averages)};"
                " resume with the decays it was started with"
            )

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copies the averages of a state. Raises ValueError where it holds other ones."""
        self.check(state)
        for name, average in self.averages.items():
            for key, tensor in average.items():
                local(tensor).copy_(local(split_like(state[name][key], tensor)))


def posthoc_weights(snapshots: Sequence[tuple[int, float]], target: tuple[int, float]) -> Tensor:
    """N stored (step, sigma_rel), target (step, sigma_rel) -> (N,) float64: the snapshots' coefficients in `combine`.

    Least-squares fit of the target power-function profile by the stored ones (EDM2, Algorithm 3).
    """
    stored = [(float(step), Power(width).gamma) for step, width in snapshots]
    fitted = (float(target[0]), Power(target[1]).gamma)
    gram = torch.tensor([[_profile_product(a, b) for b in stored] for a in stored], dtype=torch.float64)
    right = torch.tensor([_profile_product(a, fitted) for a in stored], dtype=torch.float64)
    return torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0]


def posthoc_residual(
    snapshots: Sequence[tuple[int, float]], target: tuple[int, float], weights: Tensor
) -> float:
    """Norm of the target profile less the weighted sum of the stored ones, over the norm of the target profile."""
    stored = [(float(step), Power(width).gamma) for step, width in snapshots]
    fitted = (float(target[0]), Power(target[1]).gamma)
    gram = torch.tensor([[_profile_product(a, b) for b in stored] for a in stored], dtype=torch.float64)
    right = torch.tensor([_profile_product(a, fitted) for a in stored], dtype=torch.float64)
    whole = _profile_product(fitted, fitted)
    left = whole - 2 * weights @ right + weights @ gram @ weights
    return math.sqrt(max(float(left), 0.0) / whole)


def _profile_product(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Integral of p_a p_b, with p(u) = (gamma + 1) u^gamma / t^(gamma + 1) on 0 < u < t (EDM2, Eq. 151)."""
    (t_a, gamma_a), (t_b, gamma_b) = a, b
    first = min(t_a, t_b)
    share = (first / t_a) ** gamma_a * (first / t_b) ** gamma_b * first / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * share


def combine(snapshots: Iterable[Mapping[str, Tensor]], weights: Tensor) -> dict[str, Tensor]:
    """N sets of parameters, (N,) -> their weighted sum in float32, accumulated in float64, one set after the other.

    Tensors that are the same in all sets are no averages (fixed tables of positions) and are taken as they are.
    """
    sums: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    varied: set[str] = set()
    for weight, snapshot in zip(weights.tolist(), snapshots, strict=True):
        for name, tensor in snapshot.items():
            first.setdefault(name, tensor)
            if name not in varied and not torch.equal(first[name], tensor):
                varied.add(name)
            sums[name] = sums[name] + weight * tensor.double() if name in sums else weight * tensor.double()
    return {name: total.float() if name in varied else first[name].float() for name, total in sums.items()}
