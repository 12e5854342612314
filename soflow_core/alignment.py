"""Representation alignment: hidden tokens of a network learn to tell the features that a frozen network sees in the clean image.

The idea is REPA's (arXiv 2410.06940): beside the method's own loss, a small head (MLP) maps the tokens behind one block, of noisy
inputs, to the features of the clean image, and 1 - cosine similarity is added with a weight. The head trains with the network and is
not part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from soflow_core.networks.base import Architecture, NetworkModule, TokenTap

WIDTH_FACTOR = 2
"""Width of the head's hidden layers, in widths of a token."""


@dataclass(frozen=True)
class Alignment:
    """Settings of the alignment term, and the features that it aligns with."""

    weight: float
    """Factor of the term in the loss, above 0."""
    block: int
    """Block behind which the tokens are taken, counted from 1."""
    features: Callable[[Tensor], Tensor]
    """Clean samples (B, C, H, W) -> features (B, D) of a sample, or (B, D, h, w) of its parts, without gradient."""
    dim: int
    """D."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"the weight of alignment is {self.weight}; give one above 0, or no alignment")


class AlignmentHead(nn.Sequential):
    """MLP of two hidden layers from tokens to features: (..., width) -> (..., dim)."""

    def __init__(self, width: int, dim: int) -> None:
        hidden = WIDTH_FACTOR * width
        super().__init__(
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, dim),
        )


def head_parameters(width: int, dim: int) -> int:
    """Number of values in the parameters of a head."""
    hidden = WIDTH_FACTOR * width
    return (width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * dim


def head_flops(width: int, dim: int, tokens: int) -> float:
    """FLOPs of a forward pass of the head for one sample; a multiply-accumulate counts as two."""
    hidden = WIDTH_FACTOR * width
    return 2.0 * tokens * (width * hidden + hidden * hidden + hidden * dim)


class AlignmentTerm:
    """The alignment term of one training: its head, and the loss of the tokens that a network's passes leave."""

    def __init__(self, settings: Alignment, architecture: Architecture, seed: int) -> None:
        self.settings = settings
        self.rows, self.columns, width = architecture.block_tokens(settings.block)
        # Other random numbers of this process stay what they are without the head.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = AlignmentHead(width, settings.dim)

    @contextmanager
    def tapped(self, network: nn.Module) -> Iterator[TokenTap]:
        """Context in which the network's passes with gradient keep the tokens behind the block."""
        assert isinstance(network, NetworkModule)
        network.tap = TokenTap(self.settings.block)
        try:
            yield network.tap
        finally:
            network.tap = None

    def loss(self, tap: TokenTap, x0: Tensor) -> Tensor:
        """-> scalar: the mean of 1 - cosine similarity, of clean samples x0 (B, C, H, W) whose noisy ones were passed in this order.

        Raises ValueError where the method's passes with gradient were of other rows than the batch's.
        """
        passed = sum(len(tokens) for tokens in tap.tokens)
        if passed != len(x0):
            raise ValueError(
                f"alignment needs each row of a batch in one pass with gradient, and this method passes {passed} of {len(x0)}: leave "
                "alignment out"
            )
        tokens = torch.cat([each.float() for each in tap.tokens])
        with torch.no_grad():
            target = self.settings.features(x0).float()
        return alignment_loss(self.head, tokens, target, (self.rows, self.columns))


def alignment_loss(head: nn.Module, tokens: Tensor, target: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, N, W), (B, D) or (B, D, h, w) -> scalar: the mean of 1 - cos(head(tokens), target).

    Features of a whole sample are compared with the mean of its tokens; those of its parts are resized to the grid of the tokens.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        if target.dim() == 2:
            return 1 - cosine_similarity(head(tokens.mean(dim=1)), target, dim=-1).mean()
        if tuple(target.shape[2:]) != grid:
            target = interpolate(target, grid, mode="bilinear", antialias=True)
        return 1 - cosine_similarity(head(tokens), target.flatten(2).transpose(1, 2), dim=-1).mean()
