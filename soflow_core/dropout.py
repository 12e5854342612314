"""Seed of a network's dropout in a training step: all passes of a step have the same masks, and a step repeats them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from soflow_core.networks.base import NetworkModule


@contextmanager
def dropout(network: nn.Module, seed: int, step: int, piece: int) -> Iterator[None]:
    """Context in which a network with dropout has masks: those of this seed, step, rank and piece of the rank's rows.

    Outside of it no pass has any, in training mode neither.
    """
    if not isinstance(network, NetworkModule) or network.dropout_share == 0:
        yield
        return
    network.dropout_seed = step_seed("dropout", seed, step, piece)
    try:
        yield
    finally:
        network.dropout_seed = None


def step_seed(purpose: str, *place: int) -> int:
    """A number of 63 bits that is another one for other arguments, and on other ranks."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    digest = hashlib.blake2b(repr((purpose, rank, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
