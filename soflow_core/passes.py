"""How an objective runs the network: in which precision each pass goes, which rows it may leave out, and
who teaches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from soflow_core.settings import check_choices

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
    teacher: Network | None = None
    """Gives the targets of a method with a teacher; None is the network itself."""
    uniform: bool = False
    """Whether every rank makes the same passes, of no rows where it needs none: each pass of a sharded network
    is an exchange that all ranks take part in.
    """

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True)
class Passes:
    """A network under a policy. Results are float32."""

    network: Network
    policy: PassPolicy

    def tolerant(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """A pass whose rounding stays its own size: guidance and Flow Matching."""
        return self._run(self.network, x, t, s, labels, self.policy.precision != "float32")

    def exact(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """A pass that enters a difference quotient, which divides its rounding by r: never bfloat16 under
        `mixed`. On a GPU its products are TF32 there, and float32 under `float32`.
        """
        return self._run(self.network, x, t, s, labels, self.policy.precision == "bfloat16")

    @torch.no_grad()
    def taught(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """A pass of the teacher."""
        return self._run(
            self.policy.teacher or self.network, x, t, s, labels, self.policy.precision != "float32"
        )

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
        if len(rows) or self.policy.uniform:
            result[rows] = run(x[rows], t[rows], s[rows], None if labels is None else labels[rows])
        return result

    @torch.no_grad()
    def total_derivative(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, velocity: Tensor
    ) -> Tensor:
        """-> dF/dt = v . dF/dx + dF/dt, with s held: one Jacobian-vector product along (v, 1, 0), without
        autocast.

        Only the mathematical attention kernel has a forward-mode derivative, so it is chosen here; compiled
        networks run as they were written. Raises ValueError where the network loses the derivative.
        """
        try:
            with (
                sdpa_kernel(SDPBackend.MATH),
                torch.compiler.set_stance("force_eager"),
                forward_ad.dual_level(),
            ):
                moving = forward_ad.make_dual(x, velocity), forward_ad.make_dual(t, torch.ones_like(t))
                tangent: Tensor | None = forward_ad.unpack_dual(self.network(*moving, s, labels)).tangent
                if tangent is None:
                    raise ValueError(
                        "the network's result does not depend on x and t, or was detached from them"
                    )
                return tangent
        except NotImplementedError as error:
            raise NotImplementedError(
                f"an operation of the network lacks the forward-mode derivative this method needs ({error})"
            ) from error

    def _run(
        self, network: Network, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, bfloat16: bool
    ) -> Tensor:
        if not torch.is_grad_enabled() and isinstance(network, DistributedDataParallel):
            # Ranks differ in how many rows they need here, so nothing may be exchanged.
            network = cast(Network, network.module)
        if not bfloat16:
            return network(x, t, s, labels)
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return network(x, t, s, labels).float()
