"""Averages of parameters: power-function profiles and their reconstruction, against brute force."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from soflow_core.ema import EMA, Power, combine, posthoc_weights

STEPS = 1000


def power_profile(gamma: float, last: int, total: int) -> torch.Tensor:
    """(total,): the exact weight of the parameters after each step in a power-function average made at `last`."""
    k = torch.arange(1, total + 1, dtype=torch.float64)
    weights = (k ** (gamma + 1) - (k - 1) ** (gamma + 1)) / last ** (gamma + 1)
    return torch.where(k <= last, weights, 0)


def trajectory() -> torch.Tensor:
    """(steps, 8): a random walk, as parameters are."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(STEPS, 8, generator=generator, dtype=torch.float64).cumsum(0) / 10


@given(width=st.floats(0.01, 0.27))
def test_gamma_has_the_relative_width_it_was_made_for(width: float) -> None:
    """sigma_rel is the standard deviation of the profile over the length of training."""
    gamma = Power(width).gamma
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = (gamma + 1) * u**gamma
    mean = (density * u).mean()
    assert ((density * u**2).mean() - mean**2).sqrt().item() == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_widths_of_the_edm2_paper(width: float, gamma: float) -> None:
    assert Power(width).gamma == pytest.approx(gamma, abs=0.01)


def test_an_update_does_not_solve_for_gamma_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ema = EMA({"w": torch.zeros(1)}, power_widths=(0.1,))
    ema.update([torch.ones(1)], step=1)
    monkeypatch.setattr("soflow_core.ema._relative_width", None)
    ema.update([torch.ones(1)], step=2)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_running_power_average_is_the_brute_force_average(width: float) -> None:
    values = trajectory()
    ema = EMA({"w": values[0]}, power_widths=(width,))
    for k in range(300):
        ema.update([values[k].float()], step=k + 1)
    expected = (power_profile(Power(width).gamma, 300, STEPS)[:, None] * values).sum(0)
    assert_close(ema.average(f"power-{width:g}")["w"].double(), expected, rtol=1e-4, atol=1e-4)


def snapshots() -> tuple[list[tuple[int, float]], list[Tensor]]:
    """Two widths, saved every 50 steps: their (step, width) and exact profiles."""
    kept = [(step, width) for step in range(50, STEPS + 1, 50) for width in (0.05, 0.1)]
    return kept, [power_profile(Power(width).gamma, step, STEPS) for step, width in kept]


def test_a_kept_average_is_reconstructed_as_itself() -> None:
    kept, _ = snapshots()
    weights = posthoc_weights(kept, (500, 0.05))
    expected = torch.tensor([1.0 if item == (500, 0.05) else 0.0 for item in kept], dtype=torch.float64)
    assert_close(weights, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [0.04, 0.07, 0.08, 0.12, 0.15])
def test_a_width_that_was_not_kept_is_reconstructed_from_two_that_were(width: float) -> None:
    kept, profiles = snapshots()
    weights = posthoc_weights(kept, (STEPS, width))
    target = power_profile(Power(width).gamma, STEPS, STEPS)
    made = sum(w * p for w, p in zip(weights, profiles, strict=True))
    assert made.sum().item() == pytest.approx(1, abs=1e-3)
    assert ((made - target).norm() / target.norm()).item() < 0.02
    values = trajectory()
    found = combine([{"w": (p[:, None] * values).sum(0)} for p in profiles], weights)["w"]
    brute_force = (target[:, None] * values).sum(0)
    assert_close(found.double(), brute_force, rtol=0, atol=0.02)


def test_the_fit_is_the_least_squares_one() -> None:
    """No other combination of the kept profiles is nearer to the target one."""
    kept = [(250, 0.1), (500, 0.1), (500, 0.05), (1000, 0.1)]
    profiles = torch.stack([power_profile(Power(w).gamma, s, STEPS) for s, w in kept], dim=1)
    target = power_profile(Power(0.08).gamma, 1000, STEPS)
    brute_force = torch.linalg.lstsq(profiles, target[:, None]).solution[:, 0]
    assert_close(posthoc_weights(kept, (1000, 0.08)), brute_force, rtol=0.02, atol=5e-3)


def test_several_averages_are_kept_at_once_and_told_apart() -> None:
    ema = EMA({"w": torch.zeros(1)}, decays=(0.9, 0.9999), power_widths=(0.05,))
    ema.update([torch.ones(1)], step=1)
    assert ema.average()["w"].item() == pytest.approx(0.1)
    assert ema.average("0.9999")["w"].item() == pytest.approx(1e-4, rel=1e-3)
    assert ema.average("power-0.05")["w"].item() == 1
    with pytest.raises(KeyError, match=r"there are: 0\.9, 0\.9999, power-0\.05"):
        ema.average("0.5")


def test_the_same_decay_twice_and_impossible_decays_are_refused() -> None:
    with pytest.raises(ValueError, match="asked for twice"):
        EMA({"w": torch.zeros(1)}, decays=(0.9, 0.9))
    with pytest.raises(ValueError, match="not in 0 to below 1"):
        EMA({"w": torch.zeros(1)}, decays=(1.0,))
    with pytest.raises(ValueError, match="width"):
        EMA({"w": torch.zeros(1)}, power_widths=(math.sqrt(0.2),))


def test_other_averages_than_the_kept_ones_are_not_loaded() -> None:
    ema = EMA({"w": torch.zeros(1)}, decays=(0.9,))
    with pytest.raises(ValueError, match="resume with the decays it was started with"):
        ema.load_state_dict(EMA({"w": torch.zeros(1)}, decays=(0.8,)).state_dict())


def test_an_average_of_every_third_step_has_the_factors_of_three_in_float64() -> None:
    parameters = {"p": torch.full((2,), 1.0), "q": torch.zeros(3)}
    rare = EMA(parameters, [0.9], [0.1], every=3)
    keep = 0.9**3
    for step in range(1, 8):
        parameters["p"] = torch.full((2,), 1.0 + step)
        rare.update(parameters.values(), step)
        if step < 3:
            assert torch.equal(rare.average("0.9")["p"], torch.ones(2))
    expected = keep * (keep * 1.0 + (1 - keep) * 4.0) + (1 - keep) * 7.0
    assert rare.average("0.9")["p"].tolist() == pytest.approx([expected] * 2, abs=1e-6)
    # A power-function average forgets where it started with its first update.
    power = Power(0.1)
    assert power.keep_over(3, 3) == 0.0
    assert power.keep_over(6, 3) == pytest.approx(power.keep(4) * power.keep(5) * power.keep(6))
    share = power.keep_over(6, 3)
    assert rare.average(power.name)["p"].tolist() == pytest.approx(
        [share * 4 + (1 - share) * 7] * 2, rel=1e-6
    )


@pytest.mark.parametrize("every", [1, 2])
def test_a_training_may_keep_no_average(every: int) -> None:
    ema = EMA({"w": torch.zeros(1)}, every=every)
    for step in range(1, 5):
        ema.update([torch.ones(1)], step)
    with pytest.raises(KeyError, match="there are: none"):
        ema.average()
