"""Networks F(x, t, s, labels).

base        interface of a network: its architecture, and the module that it builds
dit         diffusion transformer with two times (DiT)
blocks      its blocks and output layer
layers      its patch embedding, norm, attention and MLPs
embeddings  embeddings of times and labels
positions   table of positions, and rotations of queries and keys
sizes       the named sizes, S/2 to XL/8
"""

import importlib
import pkgutil

from soflow_core.labels import NULL_LABEL
from soflow_core.networks.base import NETWORKS, Architecture, NetworkModule
from soflow_core.networks.dit import DiT, DiTConfig
from soflow_core.networks.sizes import SIZES, dit_config

# A network whose module no line above imports is registered all the same.
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

__all__ = [
    "NETWORKS",
    "NULL_LABEL",
    "SIZES",
    "Architecture",
    "DiT",
    "DiTConfig",
    "NetworkModule",
    "dit_config",
]
