"""Bitwise comparison of tensors between ranks, by a digest of two integers for each tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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


def _digest(tensor: Tensor) -> Tensor:
    values = tensor.detach().contiguous().flatten()
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(width).long()
    if values.is_floating_point():
        bits = torch.where(torch.isnan(values), 0x7FC00000, bits)
    weights = 2 * torch.arange(len(bits), device=bits.device) + 1
    return torch.stack([bits.sum(), (bits * weights).sum()])
