"""Networks F(x, t, s, labels).

dit       diffusion transformer with two times (DiT)
layers    its patch embedding, attention and MLP
sizes     the named sizes, S/2 to XL/8
"""

from soflow_core.labels import NULL_LABEL
from soflow_core.networks.dit import DiT, DiTConfig
from soflow_core.networks.sizes import SIZES, dit_config

__all__ = ["NULL_LABEL", "SIZES", "DiT", "DiTConfig", "dit_config"]
