"""Methods that are sampled in steps between times from 1 to 0, and the settings of those times."""

from __future__ import annotations

from dataclasses import dataclass

from soflow_core.objectives.base import Objective
from soflow_core.samplers.grids import check_times, time_grid, uniform_times
from soflow_core.settings import check_values, setting


@dataclass(frozen=True)
class SteppedModel(Objective):
    """A method that is sampled in steps. Subclasses that check their own settings call `super()`."""

    sampling_times: tuple[float, ...] | None = setting(None, inert=True, sampling=True)
    """Times between 1 and 0, falling, at which the steps of sampling end, for sampling in one step more than there
    are times. None, and other numbers of steps, are those of the grid.
    """
    sampling_grid: str | None = setting(None, inert=True, sampling=True)
    """Time grid of the other numbers of steps: `NAME` or `NAME:VALUE`, such as `shifted:3`. None is the method's own: even steps."""

    def __post_init__(self) -> None:
        check_values(self)
        check_times(self.sampling_times or ())
        if self.sampling_grid is not None:
            time_grid(self.sampling_grid)

    def set_times(self, steps: int) -> list[float] | None:
        """Times from 1 to 0 between the steps of sampling, where they are set; None for the method's own.

        Raises ValueError for less than one step.
        """
        if self.sampling_times is not None and steps == len(self.sampling_times) + 1:
            return [1.0, *self.sampling_times, 0.0]
        return None if self.sampling_grid is None else time_grid(self.sampling_grid).times(steps)

    def step_times(self, steps: int) -> list[float]:
        """Times from 1 to 0 between the steps of sampling, even ones where none are set."""
        return self.set_times(steps) or uniform_times(steps)
