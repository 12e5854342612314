"""Training methods, one file each; a method is a frozen dataclass of its settings.

base                 interface of a method; batch, draws and loss of a step
step_times           the times at which the steps of sampling end
solution_model       how methods that learn the solution are sampled
soflow               Solution Flow Models
flow_matching        Flow Matching
diffusion            DDPM and DDIM
consistency          consistency models: iCT, ECT, sCM
alpha_schedule       alpha of alpha-Flow over training
total_derivative     dF/dt in a target, by a Jacobian-vector product or a difference quotient
average_velocity     shared by the next five
meanflow             MeanFlow
improved_meanflow    improved MeanFlow (iMF)
esc                  Explicit ShortCut (ESC)
alphaflow            alpha-Flow
shortcut             Shortcut models
"""

import importlib
import pkgutil

from soflow_core.objectives.alpha_schedule import AlphaSchedule
from soflow_core.objectives.alphaflow import AlphaFlow
from soflow_core.objectives.base import OBJECTIVES, Batch, Draws, Loss, Objective
from soflow_core.objectives.consistency import ContinuousConsistency, EasyConsistency, ImprovedConsistency
from soflow_core.objectives.diffusion import Diffusion
from soflow_core.objectives.esc import ExplicitShortcut
from soflow_core.objectives.flow_matching import FlowMatching
from soflow_core.objectives.improved_meanflow import ImprovedMeanFlow
from soflow_core.objectives.meanflow import MeanFlow
from soflow_core.objectives.shortcut import Shortcut
from soflow_core.objectives.soflow import SoFlow, SoFlowTimes

# A method whose module no line above imports is registered all the same.
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "OBJECTIVES",
    "AlphaFlow",
    "AlphaSchedule",
    "Batch",
    "ContinuousConsistency",
    "Diffusion",
    "Draws",
    "EasyConsistency",
    "ExplicitShortcut",
    "FlowMatching",
    "ImprovedConsistency",
    "ImprovedMeanFlow",
    "Loss",
    "MeanFlow",
    "Objective",
    "Shortcut",
    "SoFlow",
    "SoFlowTimes",
]
