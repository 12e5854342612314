"""Times: order, gaps, schedules, distributions."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soflow_core.objectives import AlphaSchedule, EasyConsistency, ImprovedConsistency
from soflow_core.random_source import GeneratorSource
from soflow_core.schedule_shapes import SHAPES
from soflow_core.times import (
    MINIMAL_GAP,
    LogitNormal,
    RatioSchedule,
    UniformTimes,
    consistency_times,
    middle_time,
)

KINDS = list(SHAPES)
unit = st.floats(0, 1, width=32)
ratios = st.floats(0.0005, 1)


@given(start=unit, end=unit, ratio=ratios)
def test_s_l_and_t_are_in_order_and_apart(start: float, end: float, ratio: float) -> None:
    t, s = consistency_times(torch.tensor([start]), torch.tensor([end]))
    middle = middle_time(t, s, ratio)
    rounding = 1e-7
    assert t >= MINIMAL_GAP
    assert s <= middle + rounding
    assert middle < t
    assert t - middle >= MINIMAL_GAP * (1 - 1e-3)


@pytest.mark.parametrize(
    ("start", "end", "t", "s"),
    [(0.9, 0.2, 0.9, 0.2), (0.2, 0.9, 0.2, 0.1999), (0.5, 0.5, 0.5, 0.4999), (0.0, 0.7, 0.0001, 0.0)],
)
def test_a_pair_in_the_wrong_order_is_clamped_and_not_swapped(
    start: float, end: float, t: float, s: float
) -> None:
    found = consistency_times(torch.tensor([start]), torch.tensor([end]))
    assert [time.item() for time in found] == pytest.approx([t, s], abs=1e-7)


@given(ratio=st.floats(0.01, 1))
def test_the_middle_time_divides_the_way_from_t_to_s(ratio: float) -> None:
    t, s = torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    assert middle_time(t, s, ratio).item() == pytest.approx(0.9 - 0.7 * ratio, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_goes_from_first_to_last_and_never_turns(kind: str) -> None:
    schedule = RatioSchedule(kind, 0.1, 0.002)
    values = [schedule.ratio(k, 1000) for k in range(1001)]
    assert values[0] == pytest.approx(0.002 if kind == "constant" else 0.1)
    assert values[-1] == pytest.approx(0.002)
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_half_way_each_schedule_is_at_its_own_mean() -> None:
    half = {kind: RatioSchedule(kind, 0.1, 0.004).ratio(50, 100) for kind in KINDS}
    expected = {"constant": 0.004, "linear": 0.052, "cosine": 0.052, "exponential": math.sqrt(0.1 * 0.004)}
    assert half == pytest.approx(expected)


def test_the_cosine_starts_flat() -> None:
    cosine, linear = (RatioSchedule(kind, 0.1, 0.0001).ratio(1, 1000) for kind in ("cosine", "linear"))
    assert 0.1 - cosine < 0.01 * (0.1 - linear)


def test_logit_normal_times_have_the_logits_they_are_named_for() -> None:
    t = (
        LogitNormal(-0.2, 0.8)
        .from_normal(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
        .double()
    )
    logits = torch.logit(t)
    assert logits.mean().item() == pytest.approx(-0.2, abs=0.01)
    assert logits.std().item() == pytest.approx(0.8, abs=0.01)


def test_uniform_times_are_equally_likely_between_their_bounds() -> None:
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    t = UniformTimes(0.2, 0.6).from_normal(normal).double()
    assert t.quantile(torch.linspace(0, 1, 5, dtype=torch.float64)).tolist() == pytest.approx(
        [0.2, 0.3, 0.4, 0.5, 0.6], abs=5e-3
    )
    assert UniformTimes().from_normal(torch.tensor([-40.0, 40.0])).tolist() == [2**-24, 1 - 2**-24]


def test_ict_levels_double_in_stages_up_to_the_last() -> None:
    objective = ImprovedConsistency()
    levels = [objective.levels(k, 8000) for k in range(8000)]
    assert levels[0] == 11
    assert levels[-1] == 1281
    assert sorted(set(levels)) == [11, 21, 41, 81, 161, 321, 641, 1281]


def test_ict_grid_ends_at_its_bounds() -> None:
    grid = ImprovedConsistency().grid(41)
    assert (grid[0].item(), grid[-1].item()) == pytest.approx((0.002, 80.0), rel=1e-5)
    assert (grid.diff() > 0).all()


def test_ict_draws_levels_as_often_as_its_discretized_log_normal() -> None:
    objective = ImprovedConsistency()
    grid = objective.grid(11)
    t = objective.draw_time(GeneratorSource(torch.Generator().manual_seed(0), 400_000))
    counts = torch.bincount(torch.searchsorted(grid, t / (1 - t), right=True).clamp(1, 10) - 1, minlength=10)
    z = (grid.double().log() + 1.1) / (2 * math.sqrt(2))
    expected = torch.erf(z).diff()
    assert torch.allclose(counts / counts.sum(), (expected / expected.sum()).float(), atol=3e-3)


def test_ect_starts_as_diffusion_and_narrows() -> None:
    objective = EasyConsistency()
    sigma = torch.tensor([0.1, 0.5, 1.0, 5.0])
    assert objective.second_level(sigma, objective.gap(0, 800))[:2].tolist() == [0, 0]
    gaps = torch.stack(
        [sigma - objective.second_level(sigma, objective.gap(k, 800)) for k in range(0, 800, 100)]
    )
    assert (gaps[1:] <= gaps[:-1]).all()
    assert gaps[-1, -1] == pytest.approx(5 * 2**-8 * (1 + 8 / (1 + math.exp(5))), rel=1e-4)


def test_alpha_falls_from_one_to_zero_and_snaps() -> None:
    schedule = AlphaSchedule()
    values = [schedule.alpha(k, 1000) for k in range(1001)]
    assert values[0] == 1
    assert values[500] == 0.5
    assert values[-1] == 0
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert all(v in (0.0, 1.0) or 5e-3 <= v <= 1 - 5e-3 for v in values)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.final is 0"):
        RatioSchedule(final=0)
    with pytest.raises(ValueError, match="negative"):
        LogitNormal(0, -1)
    with pytest.raises(ValueError, match=r"from low 0\.5 to high 0\.5; give 0 <= low"):
        UniformTimes(0.5, 0.5)


def test_ect_levels_that_float32_would_not_tell_apart_are_refused() -> None:
    """The loss is divided by their difference; a training would end there, in its last stages."""
    sigma = torch.tensor([1e-3, 1.0, 1.25, 80.0, 1e6])
    objective = EasyConsistency(stages=24)
    last = objective.second_level(sigma, objective.gap(799, 800))
    assert (last < sigma).all()
    for settings in ({"stages": 25}, {"quotient": 256.0}, {"offset": -1.0}):
        with pytest.raises(ValueError, match=r"fewer stages, or a smaller quotient|offset is"):
            EasyConsistency(**settings)
