"""The noise that rounding puts on SoFlow's difference quotient q = (f_t - f_l) / (t - l), for each precision
policy.

    python benchmarks/precision.py
    python benchmarks/precision.py --device cuda --size B/2

A network of the size, away from its initial zeros, computes q in float64 and under each policy at the
same points. The noise is rms(q - q64) / rms(q64), averaged over batches of (t, s) at a fixed middle-time
ratio r. On a CPU, TF32 is emulated: the operands of every matrix product are rounded to 10 bits of mantissa.
On a GPU `float32` has no TF32, neither in matrix products nor in the patch embedding's convolution.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from soflow_core.kernels import tf32
from soflow_core.networks import DiT, dit_config
from soflow_core.objectives import SoFlow
from soflow_core.passes import Passes, PassPolicy
from soflow_core.paths import linear
from soflow_core.rows import per_row
from soflow_core.times import consistency_times

RATIOS = (0.1, 0.01, 0.002)
MATRIX_PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution", "aten.linear"}


def round_to_tf32(x: Tensor) -> Tensor:
    """The nearest number with 10 bits of mantissa, ties away from zero."""
    if x.dtype != torch.float32:
        return x
    bits = x.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


class EmulatedTF32(TorchDispatchMode):
    """Rounds the operands of matrix products."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        if str(func).rpartition(".")[0] in MATRIX_PRODUCTS:
            args = tuple(round_to_tf32(a) if isinstance(a, Tensor) and a.ndim > 1 else a for a in args)
        return func(*args, **(kwargs or {}))


def quotient(
    objective: SoFlow, passes: Passes, x0: Tensor, x1: Tensor, t: Tensor, s: Tensor, ratio: float
) -> Tensor:
    """(B, C, H, W): q along the sample's velocity, as the consistency branch computes it."""
    path = linear(t)
    x_t, velocity = path.state(x0, x1), path.velocity(x0, x1)
    middle = t + (s - t) * ratio
    x_l = x_t + per_row(middle - t, x_t) * velocity
    f_t = objective.coefficients(t, s).solution(x_t, passes.high_precision(x_t, t, s, None))
    f_l = objective.coefficients(middle, s).solution(x_l, passes.high_precision(x_l, middle, s, None))
    return (f_t - f_l) / per_row(t - middle, x_t)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def noise(
    network: nn.Module, wide: nn.Module, policy: str, ratio: float, options: argparse.Namespace
) -> float:
    """rms(q - q64) / rms(q64)."""
    objective, generator = SoFlow(), torch.Generator().manual_seed(0)
    precision = "bfloat16" if policy == "bfloat16" else "float32"
    passes, exact = Passes(network, PassPolicy(precision)), Passes(wide, PassPolicy())
    emulated = policy == "tf32" and options.device == "cpu"
    wrong = size = 0.0
    for _ in range(options.batches):
        x0, x1 = torch.randn(2, options.batch, 4, 32, 32, generator=generator, dtype=torch.float64)
        start = objective.times.start.from_normal(torch.randn(options.batch, generator=generator))
        end = objective.times.end.from_normal(torch.randn(options.batch, generator=generator))
        t, s = consistency_times(start, end, gap=0.1)
        rows = [a.to(options.device) for a in (x0, x1, t.double(), s.double())]
        reference = quotient(objective, exact, *rows, ratio)
        narrow = [a.float() for a in rows]
        with EmulatedTF32() if emulated else tf32(policy != "float32"):
            found = quotient(objective, passes, *narrow, ratio)
        wrong += rms(found - reference) ** 2
        size += rms(reference) ** 2
    return (wrong / size) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="S/4")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gate", type=float, default=0.05, help="std of the perturbation of every parameter")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = DiT(dit_config(options.size, channels=4, height=32, width=32, classes=1000, null_label=True))
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(options.gate * torch.randn_like(parameter))
    network = network.to(options.device)
    wide = copy.deepcopy(network).double()
    print(f"{options.size}, {options.device}: rms noise of q over rms of q")
    print("| precision of the pair | " + " | ".join(f"r = {r}" for r in RATIOS) + " |")
    print("|---" * (1 + len(RATIOS)) + "|")
    for policy in ("float32", "tf32", "bfloat16"):
        values = [noise(network, wide, policy, ratio, options) for ratio in RATIOS]
        print(f"| {policy} | " + " | ".join(f"{v:.2g}" for v in values) + " |", flush=True)


if __name__ == "__main__":
    main()
