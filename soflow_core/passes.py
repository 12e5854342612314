"""Forward passes of a network inside an objective: precision, rows that may be skipped, and teacher network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from soflow_core.rows import per_row
from soflow_core.settings import check_values

Network = Callable[..., Tensor]
"""F(x, t, s, labels): (B, C, H, W), (B,), (B,), (B,) int64 or None -> (B, C, H, W).

A network with the guidance scale as a condition takes it, (B,), as fifth argument; with the guidance interval as a condition, too,
scale, first and last time, (B, 3). The others are never given one. A network with a second head takes a `Head` as sixth argument, by
default `average`; the others are never given one.
"""

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""x, t, s and labels."""

Head = Literal["average", "velocity", "both"]
"""Output of a network with a second head: the average velocity, which other networks have alone; the velocity; or both, one after the
other in the channels.
"""

Scheduled = Mapping[str, float | Tensor]
"""Values of schedules by name: numbers, or () tensors on the device."""

Precision = Literal["float32", "mixed", "bfloat16"]
"""`mixed` runs low-precision passes in bfloat16 and high-precision ones in float32. Losses are always float32."""


@dataclass(frozen=True)
class PassPolicy:
    """How the passes of a training step run."""

    precision: Precision = "float32"
    skip_unused: bool = True
    """Whether rows whose result is multiplied by 0 are left out of a pass.

    Batch sizes then vary from step to step and masks are read back from the device, so it pays on a CPU, and not
    under a compiler or on a GPU.
    """
    teacher: Network | None = None
    """Network that computes the targets of a method with a teacher; None is the trained network itself."""
    uniform: bool = False
    """Whether every rank makes the same passes, with no rows where it needs none. Each pass of a sharded network
    is a collective, in which all ranks must take part.
    """

    separate: bool = False
    """Whether rows with different losses are passes of their own, so that both sides of a consistency loss are passes of the same
    rows: a network with dropout then has the same masks in both.
    """

    schedules: Mapping[str, Tensor] | None = None
    """Values of the method's schedules on the device, which a recorded step reads in place of the numbers of
    `Objective.schedules`; None where it is not recorded.
    """

    def __post_init__(self) -> None:
        check_values(self)


@dataclass(frozen=True)
class Passes:
    """Forward passes of a network under a policy; results are float32."""

    network: Network
    policy: PassPolicy

    def low_precision(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        scale: Tensor | None = None,
        head: Head = "average",
    ) -> Tensor:
        """A pass whose rounding error is not amplified (guidance, Flow Matching): bfloat16 under `mixed`."""
        return self._run(self.network, (x, t, s, labels), scale, self.policy.precision != "float32", head)

    def high_precision(
        self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """A pass that enters a difference quotient, which divides its rounding error by r: float32 under `mixed`.

        On a GPU its matrix products are TF32 under `mixed`, and float32 under `float32`.
        """
        return self._run(self.network, (x, t, s, labels), scale, self.policy.precision == "bfloat16")

    @torch.no_grad()
    def teacher(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """A pass of the teacher network, without gradient, in low precision."""
        network = self.policy.teacher or self.network
        return self._run(network, (x, t, s, labels), None, self.policy.precision != "float32")

    @torch.no_grad()
    def forward_where(
        self,
        run: Network,
        use: Tensor,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The pass `run`, without gradient, in the rows where `use` (B,) bool holds; the other rows may be 0.

        No pass is made of no rows, but where other ranks wait for it.
        """
        if len(x) == 0 and not self.policy.uniform:
            return torch.zeros_like(x)
        rows = torch.nonzero(use).squeeze(1) if self.policy.skip_unused else None
        if rows is None or len(rows) == len(x):
            return _call(run, (x, t, s, labels), scale)
        result = torch.zeros_like(x)
        if len(rows) or self.policy.uniform:
            chosen = None if labels is None else labels[rows]
            scales = None if scale is None else scale[rows]
            result[rows] = _call(run, (x[rows], t[rows], s[rows], chosen), scales)
        return result

    @torch.no_grad()
    def total_derivative(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None,
        velocity: Tensor,
        difference: float | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """-> dF/dt = v . dF/dx + dF/dt at fixed s, without gradient.

        A Jacobian-vector product where `difference` is None, else a quotient of F over a time of twice `difference`.
        """
        if difference is None:
            return self._jacobian_vector_product((x, t, s, labels), scale, velocity)
        return self._difference_quotient((x, t, s, labels), scale, velocity, difference)

    def _jacobian_vector_product(
        self, arguments: Arguments, scale: Tensor | None, velocity: Tensor
    ) -> Tensor:
        """One Jacobian-vector product along (v, 1, 0), without autocast.

        Only the math attention kernel has a forward-mode derivative, so it is selected here; compiled networks run
        uncompiled. Raises ValueError where the network loses the derivative.
        """
        x, t, s, labels = arguments
        try:
            with (
                sdpa_kernel(SDPBackend.MATH),
                torch.compiler.set_stance("force_eager"),
                forward_ad.dual_level(),
            ):
                moving = forward_ad.make_dual(x, velocity), forward_ad.make_dual(t, torch.ones_like(t))
                result = _call(self.network, (*moving, s, labels), scale)
                tangent: Tensor | None = forward_ad.unpack_dual(result).tangent
                if tangent is None:
                    raise ValueError(
                        "the network's result does not depend on x and t, or was detached from them"
                    )
                return tangent
        except NotImplementedError as error:
            raise NotImplementedError(
                f"an operation of the network lacks the forward-mode derivative this method needs ({error})"
            ) from error

    def _difference_quotient(
        self, arguments: Arguments, scale: Tensor | None, velocity: Tensor, difference: float
    ) -> Tensor:
        """(F(x + (t2 - t) v, t2, s) - F(x + (t1 - t) v, t1, s)) / (t2 - t1), t1 = max(t - h, s), t2 = min(t + h, 1).

        Its error is of second order in h, of first where one of the times is cut off. t2 - t1 is at least h, or 1 - s where that is
        less: targets multiply by t - s, so that rounding does not grow in them.
        """
        x, t, s, labels = arguments
        earlier, later = torch.maximum(t - difference, s), (t + difference).clamp(max=1)
        points = [x + per_row(time - t, x) * velocity for time in (later, earlier)]
        both = None if labels is None else labels.repeat(2)
        scales = None if scale is None else torch.cat([scale, scale])
        times = torch.cat([later, earlier])
        values = self.high_precision(torch.cat(points), times, s.repeat(2), both, scales)
        ahead, behind = values.chunk(2)
        return (ahead - behind) / per_row(later - earlier, x)

    def _run(
        self,
        network: Network,
        arguments: Arguments,
        scale: Tensor | None,
        bfloat16: bool,
        head: Head = "average",
    ) -> Tensor:
        if not torch.is_grad_enabled() and isinstance(network, DistributedDataParallel):
            # Ranks may differ in how many rows they need, so DDP must not communicate.
            network = cast(Network, network.module)
        if not bfloat16:
            return _call(network, arguments, scale, head)
        with torch.autocast(arguments[0].device.type, dtype=torch.bfloat16):
            return _call(network, arguments, scale, head).float()


def at_scale(
    network: Network, scale: float | None, noise: Tensor, interval: tuple[float, float] | None = None
) -> Network:
    """The network with this guidance scale as its condition, for rows like those of `noise`; None is without one.

    `interval` is the guidance interval where that is a condition, too.
    """
    if scale is None:
        return network
    columns = [noise.new_full((len(noise),), value) for value in (scale, *(interval or ()))]
    return partial(network, scale=columns[0] if interval is None else torch.stack(columns, dim=1))


def _call(network: Network, arguments: Arguments, scale: Tensor | None, head: Head = "average") -> Tensor:
    if head != "average":
        return network(*arguments, scale, head)
    return network(*arguments) if scale is None else network(*arguments, scale)
