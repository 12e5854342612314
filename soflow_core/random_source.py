"""Where a training step's random numbers come from, in two versions that a checkpoint tells apart.

1  `GeneratorSource`: a torch generator on the CPU, whose numbers are drawn one after the other for the whole batch.
2  `CounterSource`: functions of (seed, step, draw, global row) on the training device, for the rank's own rows alone.

The numbers of the two differ, so a training that began with one goes on with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from soflow_core.counter_draws import STEP, fourth_word, integer_rows, normal_rows, uniform_rows

DrawsVersion = Literal[1, 2]
MOST_STEPS = 2**32


class RandomSource(ABC):
    """Random numbers of one step, one for each of some rows of the global batch. Each call draws anew."""

    batch_size: int
    """Rows of the global batch."""
    rows: Tensor
    """(n,) int64: numbers of this source's rows in the global batch, ascending."""

    def leading(self, count: int) -> int:
        """How many of this source's rows are among the first `count` rows of the global batch."""
        return count

    @abstractmethod
    def normal(self, *shape: int) -> Tensor:
        """-> (n, *shape) float32, standard normal."""

    @abstractmethod
    def uniform(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """-> (n,) in [0, 1), float32 or float64."""

    @abstractmethod
    def integers(self, high: int) -> Tensor:
        """-> (n,) int64 from 0 to below `high`."""

    @abstractmethod
    def common_integer(self, high: int) -> Tensor:
        """-> () int64 from 0 to below `high`, the same for all rows of the batch."""

    @abstractmethod
    def common_uniform(self) -> Tensor:
        """-> (batch_size,) float32 in [0, 1): a number for every row of the batch, whichever this source's are."""


class GeneratorSource(RandomSource):
    """All rows of the batch from a torch generator, on the CPU; None is torch's default generator."""

    def __init__(self, generator: torch.Generator | None, batch_size: int) -> None:
        self.batch_size = batch_size
        self.rows = torch.arange(batch_size)
        self._generator = generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch_size, *shape, generator=self._generator)

    def uniform(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(self.batch_size, generator=self._generator, dtype=dtype)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.batch_size,), generator=self._generator)

    def common_integer(self, high: int) -> Tensor:
        return torch.randint(high, (), generator=self._generator)

    def common_uniform(self) -> Tensor:
        return self.uniform()


class CounterSource(RandomSource):
    """Rows rank, rank + world, ... of the batch, each number a function of (seed, step, its draw's number, its row).

    Raises ValueError for a step that the counter has no room for.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= step < MOST_STEPS:
            raise ValueError(f"step {step:,} is outside 0 to {MOST_STEPS - 1:,}")
        self.batch_size = batch_size
        self.rows = torch.arange(rank, batch_size, world, device=device)
        self._seed, self._step, self._rank, self._world = seed, step, rank, world
        self._draws = 0

    def leading(self, count: int) -> int:
        return len(range(self._rank, count, self._world))

    def normal(self, *shape: int) -> Tensor:
        return normal_rows(self._seed, self.rows, shape, self._step, self._next())

    def uniform(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return uniform_rows(self._seed, self.rows, self._step, self._next(), dtype)

    def integers(self, high: int) -> Tensor:
        return integer_rows(self._seed, self.rows, high, self._step, self._next())

    def common_integer(self, high: int) -> Tensor:
        first = torch.zeros(1, dtype=torch.int64, device=self.rows.device)
        return integer_rows(self._seed, first, high, self._step, self._next())[0]

    def common_uniform(self) -> Tensor:
        every = torch.arange(self.batch_size, device=self.rows.device)
        return uniform_rows(self._seed, every, self._step, self._next())

    def _next(self) -> int:
        """The counter's fourth word of the next draw: draws are numbered in the order in which they are called."""
        self._draws += 1
        return fourth_word(STEP, self._draws - 1)
