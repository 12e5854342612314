"""A method and a network as plugins, and a process's registries put back as they were."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from soflow_core import plugins
from soflow_core.registration import Registry

METHOD = '''"""Flow Matching whose loss is multiplied by a factor."""

from __future__ import annotations

from dataclasses import dataclass

from soflow_core.objectives import FlowMatching, Loss
from soflow_core.registration import register


@register("weighted_flow")
@dataclass(frozen=True)
class WeightedFlow(FlowMatching):
    """Flow Matching times a factor."""

    factor: float = 2.0

    def loss(self, *arguments) -> Loss:
        loss = super().loss(*arguments)
        return Loss(self.factor * loss.loss, loss.terms)
'''
NETWORK = '''"""A network of one convolution, which knows nothing of time and labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from soflow_core.networks import Architecture, NetworkModule
from soflow_core.registration import register


@register("convolution")
@dataclass(frozen=True)
class ConvolutionConfig(Architecture):
    """One convolution."""

    kernel: int = 3

    @property
    def title(self) -> str:
        return f"Convolution-{self.kernel}"

    def build(self) -> NetworkModule:
        return Convolution(self)

    def parameters(self) -> int:
        return self.channels**2 * self.kernel**2 + self.channels

    def forward_flops(self) -> float:
        return 2 * self.channels**2 * self.kernel**2 * self.height * self.width


class Convolution(NetworkModule):
    """The network of a ConvolutionConfig."""

    def __init__(self, config: ConvolutionConfig) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Conv2d(config.channels, config.channels, config.kernel, padding=config.kernel // 2)

    def forward(self, x, t, s, labels=None, scale=None):
        return self.layer(x)
'''


def write_plugins(folder: Path) -> tuple[Path, Path]:
    """Files `weighted_flow.py` and `convolution_net.py`."""
    method, network = folder / "weighted_flow.py", folder / "convolution_net.py"
    method.write_text(METHOD, encoding="utf-8")
    network.write_text(NETWORK, encoding="utf-8")
    return method, network


@contextlib.contextmanager
def restored_registries() -> Iterator[None]:
    """Context after which no plugin that was imported in it is known any more."""
    parts = {registry.kind: dict(registry.parts) for registry in Registry.all}
    known, modules, asked = dict(plugins._loaded), set(sys.modules), plugins._asked
    try:
        yield
    finally:
        for registry in Registry.all:
            registry.parts = parts.get(registry.kind, {})
        plugins._loaded, plugins._asked = known, asked
        for name in set(sys.modules) - modules:
            module = sys.modules[name]
            if "soflow" not in name and getattr(module, "__file__", None) and name.split(".")[0] in ADDED:
                del sys.modules[name]


ADDED = {
    "weighted_flow",
    "convolution_net",
    "broken_plugin",
    "packed_plugin",
    "secant",
    "small_unet",
    "coverage",
    "midpoint",
    "npy_pairs",
    "bent_path",
    "leaning",
    "mode_times",
    "schedules",
    "kid_all",
    "block_means",
}
"""Modules that tests import as plugins."""
