"""The contracts of what a training draws its times from and goes by: time distributions, shapes of schedules and decays.

For every registered one, or those of `--times`, `--shape`, `--alpha` and `--decay`.
"""

from __future__ import annotations

import json
import pickle
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from soflow_core.objectives import OBJECTIVES, AlphaSchedule, MeanFlow
from soflow_core.objectives.alpha_schedule import ALPHAS, AlphaShape
from soflow_core.optimizer import OptimizerConfig
from soflow_core.schedule_shapes import DECAYS, SHAPES, DecayShape, ScheduleShape
from soflow_core.settings import to_dict
from soflow_core.times import RatioSchedule, TimeDistribution

PROGRESS = [number / 200 for number in range(201)]
NORMALS = torch.linspace(-5, 5, 201)
"""One number in two million is beyond them."""
ROUNDING = 1e-12


def rises(values: list[float]) -> bool:
    return all(after >= before - ROUNDING for before, after in pairwise(values))


@pytest.fixture
def times(times_class: type[TimeDistribution]) -> TimeDistribution:
    return times_class()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_are_between_data_and_noise(times: TimeDistribution, dtype: torch.dtype) -> None:
    drawn = times.from_normal(NORMALS.to(dtype))
    assert (drawn.shape, drawn.dtype) == (NORMALS.shape, dtype)
    assert ((drawn > 0) & (drawn < 1)).all()
    assert drawn[-1] > drawn[0], "there is more than one time"


def test_a_larger_number_gives_no_smaller_time(times: TimeDistribution) -> None:
    """So that the larger of two draws is that of the larger number, whatever the distribution."""
    assert (times.from_normal(NORMALS.double()).diff() >= 0).all()


def test_times_are_functions_of_their_own_numbers(times: TimeDistribution) -> None:
    before, given = torch.get_rng_state(), NORMALS.clone()
    drawn = times.from_normal(given)
    assert torch.equal(before, torch.get_rng_state()), "all randomness is in the numbers"
    assert torch.equal(given, NORMALS), "which are not changed in place"
    assert torch.equal(drawn, times.from_normal(NORMALS))
    assert_close(times.from_normal(NORMALS[7:9]), drawn[7:9])


def test_a_method_with_such_times_survives_a_header(times: TimeDistribution) -> None:
    method = MeanFlow(time=times)
    assert OBJECTIVES.read(json.loads(json.dumps(to_dict(method)))) == method
    assert pickle.loads(pickle.dumps(times)) == times
    assert hash(times) == hash(type(times)())
    draws = method.draw(torch.Generator().manual_seed(0), 16, (1, 2, 2), conditional=False)
    assert ((draws.s > 0) & (draws.s <= draws.t) & (draws.t < 1)).all()


@pytest.mark.parametrize(("start", "end"), [(0.1, 0.002), (0.002, 0.1), (1.0, 1e-4)])
def test_a_shape_ends_at_the_second_value_and_never_turns(
    shape_class: type[ScheduleShape], start: float, end: float
) -> None:
    shape = shape_class()
    values = [shape.between(start, end, progress) for progress in PROGRESS]
    assert values[0] == pytest.approx(start) or values == [end] * len(values), (
        "the first value, or the second throughout"
    )
    assert values[-1] == pytest.approx(end)
    assert rises(values if start < end else values[::-1])
    assert RatioSchedule(shape.name, 0.1, 0.002).ratio(5, 10) == SHAPES.named(shape.name).between(
        0.1, 0.002, 0.5
    )


def test_a_shape_between_equal_values_stays(shape_class: type[ScheduleShape]) -> None:
    assert [shape_class().between(0.3, 0.3, progress) for progress in PROGRESS] == pytest.approx([0.3] * 201)


def test_alpha_is_a_share_that_never_rises(alpha_class: type[AlphaShape]) -> None:
    schedule = AlphaSchedule(kind=alpha_class.name)
    assert ALPHAS.named(schedule.kind) == alpha_class()
    values = [schedule.alpha(step, 200) for step in range(201)]
    assert 0 <= min(values) <= max(values) <= 1
    assert rises(values[::-1])


def test_a_decay_is_a_share_that_rises_to_the_whole_or_none(decay_class: type[DecayShape]) -> None:
    decay = decay_class()
    assert DECAYS.named(decay.name) == decay
    shares = [decay.share(progress) for progress in PROGRESS]
    assert (shares[0], shares[-1]) in ((0, 1), (0, 0))
    assert rises(shares)
    assert 0 <= min(shares) <= max(shares) <= 1


def test_a_learning_rate_with_such_a_decay_stays_between_its_ends(decay_class: type[DecayShape]) -> None:
    optimizer = OptimizerConfig(lr=1e-3, decay=decay_class.name, final_lr=1e-5, warmup_steps=3)
    rates = [optimizer.learning_rate(step, 50) for step in range(50)]
    assert rises(rates[:3])
    assert rises(rates[:1:-1])
    assert 1e-5 <= min(rates) <= max(rates) <= 1e-3
