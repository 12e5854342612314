"""The network of an exported folder as a model of diffusers: it is copied there as `transformer/soflow_transformer.py`.

diffusers has no transformer that is conditioned on two times. Needs `soflow_core`, which the package `soflow` holds.
"""

from __future__ import annotations

from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from soflow_core.networks import NETWORKS


class SoFlowTransformer(ModelMixin, ConfigMixin):
    """A network with two times, F(x, t, s, labels), from the settings of its architecture."""

    @register_to_config
    def __init__(self, architecture: dict[str, Any]) -> None:
        super().__init__()
        self.network = NETWORKS.read(architecture).build()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """(B, C, H, W), (B,), (B,), (B,) or None, (B,) or None -> (B, C, H, W); noise is at t = 1."""
        predicted: Tensor = self.network(x, t, s, labels, scale)
        return predicted
