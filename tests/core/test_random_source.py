"""Sources of a step's randomness: rows of a counter's draws are the same for any number of ranks, with a generator's distributions."""

import pytest
import torch
from torch import Tensor

from soflow_core.objectives import OBJECTIVES, Draws, Objective, SoFlow
from soflow_core.random_source import CounterSource, GeneratorSource

SHAPE = (2, 3, 3)
ROWS = 13


def tensors(draws: Draws) -> dict[str, Tensor]:
    return {name: value for name, value in vars(draws).items() if isinstance(value, Tensor)}


def drawn(
    objective: Objective, step: int = 4, rank: int = 0, world: int = 1, conditional: bool = True
) -> Draws:
    return objective.draw_from(CounterSource(7, step, ROWS, rank, world), SHAPE, conditional)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_each_rank_draws_its_own_rows_of_the_same_batch(method: str, conditional: bool) -> None:
    objective = OBJECTIVES[method]()
    whole = drawn(objective, conditional=conditional)
    for world in (2, 4):
        for rank in range(world):
            own, expected = drawn(objective, 4, rank, world, conditional), whole.rows(rank, world)
            assert own.velocity_rows == expected.velocity_rows
            assert tensors(own).keys() == tensors(expected).keys()
            assert all(torch.equal(tensors(own)[name], value) for name, value in tensors(expected).items())


@pytest.mark.parametrize("method", sorted(OBJECTIVES))
def test_a_counters_draws_are_distributed_as_a_generators(method: str) -> None:
    objective, rows = OBJECTIVES[method](), 40_000
    one = objective.draw(torch.Generator().manual_seed(0), rows, (1, 1, 1), conditional=True)
    other = objective.draw_from(CounterSource(0, 1, rows), (1, 1, 1), conditional=True)
    assert one.velocity_rows == other.velocity_rows
    assert tensors(one).keys() == tensors(other).keys()
    for name, value in tensors(one).items():
        a, b = value.double().flatten(), tensors(other)[name].double().flatten()
        assert value.dtype == tensors(other)[name].dtype
        for part in (slice(None, one.velocity_rows), slice(one.velocity_rows, None)):
            if len(a[part]):
                error = 5 * (a[part].std() / len(a[part]) ** 0.5).nan_to_num() + 1e-12
                # The first n labels are dropped, n binomial: its deviation is that of all rows.
                error = max(error, 5 * 0.3 / rows**0.5) if name == "dropped" else error
                assert abs(a[part].mean() - b[part].mean()) < 1.5 * error, (name, part)


def test_steps_and_draws_differ_and_a_step_is_the_same_twice() -> None:
    assert not torch.equal(drawn(SoFlow(), 4).noise, drawn(SoFlow(), 5).noise)
    assert torch.equal(drawn(SoFlow(), 4).noise, drawn(SoFlow(), 4).noise)
    source = CounterSource(7, 4, ROWS)
    assert not torch.equal(source.normal(), source.normal())
    with pytest.raises(ValueError, match="outside 0"):
        CounterSource(7, 2**32, ROWS)


def test_a_generators_numbers_are_drawn_one_after_the_other() -> None:
    source, plain = GeneratorSource(torch.Generator().manual_seed(1), 5), torch.Generator().manual_seed(1)
    assert torch.equal(source.normal(2), torch.randn(5, 2, generator=plain))
    assert torch.equal(source.uniform(torch.float64), torch.rand(5, generator=plain, dtype=torch.float64))
    assert torch.equal(source.integers(9), torch.randint(9, (5,), generator=plain))
    assert torch.equal(source.common_integer(9), torch.randint(9, (), generator=plain))


def test_a_method_with_its_own_draw_takes_a_generator_alone() -> None:
    class Own(SoFlow):
        def draw(self, generator, batch_size, sample_shape, conditional):  # type: ignore[no-untyped-def]
            return super().draw(generator, batch_size, sample_shape, conditional)

    assert SoFlow().draws_by_rows
    assert not Own().draws_by_rows
