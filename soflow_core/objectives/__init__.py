"""Training methods, each in its own file."""

from soflow_core.objectives.base import Batch, Draws, Loss, Objective
from soflow_core.objectives.soflow import SoFlow, SoFlowTimes

OBJECTIVES: dict[str, type[Objective]] = {"soflow": SoFlow}
"""Method name -> objective."""

__all__ = ["OBJECTIVES", "Batch", "Draws", "Loss", "Objective", "SoFlow", "SoFlowTimes"]
