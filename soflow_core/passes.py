"""How an objective runs the network: in which precision each pass goes, and which rows it may leave out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""F(x, t, s, labels): (B, C, H, W), (B,), (B,), (B,) int64 or None -> (B, C, H, W)."""

Precision = Literal["float32", "mixed", "bfloat16"]
"""`mixed` runs the tolerant passes in bfloat16 and the exact ones in float32; losses are float32 in all
three.
"""


@dataclass(frozen=True)
class PassPolicy:
    """The precision of passes, and whether rows whose result is multiplied by 0 are left out of them.

    Leaving rows out makes batch sizes vary from step to step and reads masks back from the device, so it pays
    on a CPU and not under a compiler or on a GPU.
    """

    precision: Precision = "float32"
    skip_unused: bool = True


@dataclass(frozen=True)
class Passes:
    """A network under a policy. Results are float32."""

    network: Network
    policy: PassPolicy

    def tolerant(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """A pass whose rounding stays its own size: guidance and Flow Matching."""
        return self._run(x, t, s, labels, self.policy.precision != "float32")

    def exact(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """A pass that enters a difference quotient, which divides its rounding by r."""
        return self._run(x, t, s, labels, self.policy.precision == "bfloat16")

    def _run(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, bfloat16: bool) -> Tensor:
        if not bfloat16:
            return self.network(x, t, s, labels)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.network(x, t, s, labels).float()

    @torch.no_grad()
    def used(
        self, run: Network, use: Tensor, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None
    ) -> Tensor:
        """A pass without gradient of which only the rows `use` (B,) matter; the others may come back as 0."""
        if not self.policy.skip_unused:
            return run(x, t, s, labels)
        rows = torch.nonzero(use).squeeze(1)
        if len(rows) == len(x):
            return run(x, t, s, labels)
        result = torch.zeros_like(x)
        if len(rows):
            result[rows] = run(x[rows], t[rows], s[rows], None if labels is None else labels[rows])
        return result
