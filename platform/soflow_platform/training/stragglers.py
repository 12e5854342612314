"""soflow_platform.training.stragglers"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from soflow_platform.training.distributed import all_gather_list

SLOW = 1.5
"""A rank whose forward passes take this many times the median is called slow..."""


SLOW_IN_ROW = 3
"""...where they did so this many times, one after the other."""


class ForwardTimer:
    """Seconds that this rank's forward passes take.

    A step as a whole takes as long on every rank, for they wait for each other's gradients; a forward pass waits for nobody, so
    that a slow rank shows here.
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
        """(rank, how many times the median) of the slowest rank where it stays slow, once until that ends. All ranks take part."""
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
