"""Positions of patches: a table of sines and cosines that is added to them, and rotations of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from soflow_core.networks.embeddings import MAX_PERIOD


def sincos_positions(hidden: int, rows: int, columns: int) -> Tensor:
    """-> (rows * columns, hidden): position embeddings; the first half encodes the column, the second the row."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    halves = [_sincos(place.reshape(-1), hidden // 2) for place in (column, row)]
    return torch.cat(halves, dim=1).float()


def _sincos(place: Tensor, width: int) -> Tensor:
    """(N,) -> (N, width): sines, then cosines, computed in float64."""
    angles = _angles(place, width // 2)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def _angles(place: Tensor, count: int) -> Tensor:
    """(N,) -> (N, count) float64: a place times `count` frequencies from 1 down to almost 1 / MAX_PERIOD."""
    exponents = torch.arange(count, dtype=torch.float64) / count
    return place.double()[:, None] * MAX_PERIOD**-exponents


def rotary_positions(width: int, rows: int, columns: int, before: int) -> Tensor:
    """-> (2, before + rows * columns, width / 2): cosines and sines of the rotations of a head of this width, a multiple of 4.

    Pairs of channels are turned by angles in proportion to the patch's column (first half) and row (second half), so that a product of
    query and key depends on how far their patches are apart (RoPE, arXiv 2104.09864, in two dimensions). The `before` tokens that
    stand before the patches have no place and are not turned.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([_angles(place.reshape(-1), width // 4) for place in (column, row)], dim=1)
    angles = torch.cat([torch.zeros(before, width // 2, dtype=angles.dtype), angles])
    return torch.stack([torch.cos(angles), torch.sin(angles)]).float()


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """(B, heads, N, width), (2, N, width / 2) -> (B, heads, N, width): channel i of the first half with channel i of the second one."""
    (first, second), (cos, sin) = heads.chunk(2, dim=-1), rotation
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(heads.dtype)
