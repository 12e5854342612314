"""Bitwise comparison of tensors between ranks, by a digest of two integers for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Gather = Callable[[Tensor], list[Tensor]]
"""Returns every rank's version of a tensor of one shape, in rank order, on every rank."""


def digest(tensors: Sequence[Tensor | None]) -> Tensor:
    """N tensors of 1, 2, 4 or 8 bytes an element -> (N, 2) int64: sum of the bits, and sum weighted by odd numbers.

    Integers wrap around, so the order of summation does not matter. All NaN are equal; None has its own digest.
    """
    rows = [_digest(tensor) if tensor is not None else torch.tensor([-1, 0]) for tensor in tensors]
    device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    return torch.stack([row.to(device) for row in rows])


def first_difference(names: Sequence[str], tensors: Sequence[Tensor | None], gather: Gather) -> str | None:
    """Name of the first tensor that differs between ranks, or None; the same result on every rank."""
    versions = torch.stack(gather(digest(tensors)))
    differing = (versions != versions[0]).any(2).any(0).nonzero()
    return names[int(differing[0])] if len(differing) else None


def check_replicas(names: Sequence[str], parameters: Sequence[nn.Parameter], gather: Gather) -> None:
    """Raises RuntimeError, on every rank, where parameters or averaged gradients differ between ranks."""
    name = first_difference(names, parameters, gather)
    if name is not None:
        raise RuntimeError(f"{name} differs between ranks; start all with the same weights")
    name = first_difference(names, [p.grad for p in parameters], gather)
    if name is not None:
        raise RuntimeError(
            f"the gradient of {name} differs between ranks after the reduction, which must leave the same mean"
            " on all of them"
        )


def _digest(tensor: Tensor) -> Tensor:
    values = tensor.detach().contiguous().flatten()
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(width).long()
    if values.is_floating_point():
        bits = torch.where(torch.isnan(values), 0x7FC00000, bits)
    weights = 2 * torch.arange(len(bits), device=bits.device) + 1
    return torch.stack([bits.sum(), (bits * weights).sum()])
