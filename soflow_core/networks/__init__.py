"""Networks F(x, t, s, labels).

base        interface of a network: its architecture, and the module that it builds
dit         diffusion transformer with two times (DiT)
blocks      its blocks and output layer
layers      its patch embedding, norm, attention and MLPs
embeddings  embeddings of times and labels
positions   table of positions, and rotations of queries and keys
unet        U-Net for pixels, with two times
unet_layers its resampling and blocks
sizes       the named sizes, S/2 to XL/8
"""

import importlib
import pkgutil

from soflow_core.labels import NULL_LABEL
from soflow_core.networks.base import NETWORKS, Architecture, NetworkModule
from soflow_core.networks.dit import DiT, DiTConfig
from soflow_core.networks.sizes import SIZES, dit_config
from soflow_core.networks.unet import UNet, UNetConfig

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
    "UNet",
    "UNetConfig",
    "dit_config",
]
