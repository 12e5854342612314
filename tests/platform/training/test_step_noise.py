"""The draws of a trial: functions of (seed, step) alone, whichever step was asked for before."""

import threading

import pytest
import torch

from soflow_core.objectives import Draws, SoFlow
from soflow_platform.training.step_noise import StepNoisePrefetcher, step_generator


def draw(step: int) -> Draws:
    return SoFlow().draw(step_generator(seed=3, step=step), 16, (1, 4, 4), conditional=True)


def test_draws_made_ahead_are_those_of_their_step_also_after_a_jump() -> None:
    ahead = StepNoisePrefetcher(draw)
    for step in (1, 2, 3, 40, 41, 2):
        taken, own = ahead.get(step), draw(step)
        for name in ("noise", "t", "s", "dropped"):
            assert torch.equal(getattr(taken, name), getattr(own, name)), (step, name)
    ahead.close()


def test_the_next_step_is_drawn_while_this_one_is_at_work() -> None:
    drawn = {step: threading.Event() for step in (1, 2, 3)}

    def recorded(step: int) -> Draws:
        drawn[step].set()
        return draw(step)

    ahead = StepNoisePrefetcher(recorded)
    ahead.get(1)
    assert drawn[2].wait(30)
    assert not drawn[3].is_set()
    ahead.close()


def test_a_failed_draw_raises_where_it_is_taken() -> None:
    def broken(step: int) -> Draws:
        raise ValueError(f"no draws for step {step}")

    ahead = StepNoisePrefetcher(broken)
    for _ in range(2):
        with pytest.raises(ValueError, match="no draws for step 7"):
            ahead.get(7)
    ahead.close()
