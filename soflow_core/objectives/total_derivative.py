"""The total derivative of a network's output along the path, in a target: by a Jacobian-vector product, or without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from soflow_core.objectives.solution_model import SolutionModel
from soflow_core.passes import Arguments, Passes
from soflow_core.settings import setting

TotalDerivative = Callable[[Passes, Arguments, Tensor, Tensor | None], Tensor]
"""dF/dt = v . dF/dx + dF/dt at fixed s, without gradient, from the passes, (x, t, s, labels), v (B, C, H, W) and the guidance
scales (B,) or None -> (B, C, H, W)."""


@dataclass(frozen=True)
class DerivativeModel(SolutionModel):
    """A method whose target holds a total derivative of the network, and the settings of how it is computed.

    A method of one's own may override `total_derivative`: its target is given that method, whatever computes it.
    """

    derivative: Literal["jvp", "finite_difference"] = setting("jvp", inert=True)
    """How dF/dt is computed: by a Jacobian-vector product, or as a quotient of two passes without one."""
    difference: float = setting(0.005, inert=True)
    """Half the time between those passes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.difference <= 0.5:
            raise ValueError(
                f"difference is {self.difference}; it must be above 0 and at most 0.5, half of all time"
            )

    def total_derivative(
        self, passes: Passes, arguments: Arguments, velocity: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """dF/dt along `velocity`, as `TotalDerivative` has it."""
        difference = None if self.derivative == "jvp" else self.difference
        return passes.total_derivative(*arguments, velocity, difference, scale)
