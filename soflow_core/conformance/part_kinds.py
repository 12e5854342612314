"""Kinds of parts that the conformance suite tests, by the option that names one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from soflow_core.networks import NETWORKS
from soflow_core.objectives import OBJECTIVES
from soflow_core.objectives.alpha_schedule import ALPHAS
from soflow_core.parameterization import PARAMETERIZATIONS
from soflow_core.paths import PATHS
from soflow_core.registration import Registry
from soflow_core.samplers.base import SAMPLERS
from soflow_core.samplers.grids import GRIDS
from soflow_core.schedule_shapes import DECAYS, SHAPES
from soflow_core.times import TIMES

KINDS: dict[str, Callable[[], Registry[Any]]] = {
    "objective": lambda: OBJECTIVES,
    "network": lambda: NETWORKS,
    "sampler": lambda: SAMPLERS,
    "grid": lambda: GRIDS,
    "path": lambda: PATHS,
    "parameterization": lambda: PARAMETERIZATIONS,
    "times": lambda: TIMES,
    "shape": lambda: SHAPES,
    "alpha": lambda: ALPHAS,
    "decay": lambda: DECAYS,
}
"""Option -> what returns the registry of its kind. A suite of other kinds adds its own before pytest loads `command_line`."""
