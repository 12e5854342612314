"""Detection of a rank that is slower than the others, from the durations of its forward passes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from soflow_platform.training.distributed import all_gather_list

SLOW = 1.5
"""Ratio to the median duration above which a rank's forward passes count as slow."""
SLOW_IN_ROW = 3
"""A rank is reported once it has been slow in this many comparisons in a row."""


class ForwardTimer:
    """Measures the duration of this rank's forward passes and compares it with that of the other ranks.

    Whole steps take equally long on all ranks, because each waits for the gradients of the others. A forward pass waits for no
    other rank, so its duration shows which rank is slow.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.seconds = 0.0
        self._wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self._started = 0.0
        self.measuring = False
        self._slow: list[int] = []
        self._named: int | None = None
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end)

    def _begin(self, *_: Any) -> None:
        if self.measuring:
            self._wait()
            self._started = time.perf_counter()

    def _end(self, *_: Any) -> None:
        if self.measuring:
            self._wait()
            self.seconds += time.perf_counter() - self._started

    def slow_rank(self) -> tuple[int, float] | None:
        """(rank, ratio to the median duration) of a rank that stays slow, reported once; else None. A collective call."""
        seconds = all_gather_list([self.seconds])
        self.seconds = 0.0
        median = statistics.median_low(seconds)
        ratio = max(seconds) / median if median else 1.0
        rank = seconds.index(max(seconds))
        self._slow = [*self._slow, rank][-SLOW_IN_ROW:] if ratio > SLOW else []
        if not self._slow:
            self._named = None
        if self._slow != [rank] * SLOW_IN_ROW or self._named == rank:
            return None
        self._named = rank
        return rank, ratio
