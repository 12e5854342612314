"""Times and noise of each training step, drawn in a background thread during the step before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from soflow_core.objectives import Draws


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random generator of one optimizer step: a function of (seed, step), so that a checkpoint needs no generator state."""
    digest = hashlib.sha256(f"step {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class StepNoisePrefetcher:
    """Computes each step's noise and times one step ahead in a background thread.

    Every rank draws for the global batch, so that the cost does not shrink with more ranks.
    """

    def __init__(self, draw: Callable[[int], Draws]) -> None:
        """`draw` returns the draws of a step; it is called in the background thread."""
        self._draw = draw
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draws")
        self._next: tuple[int, Future[Draws]] | None = None

    def get(self, step: int) -> Draws:
        """The draws of `step`. Starts on those of the next one."""
        if self._next is None or self._next[0] != step:
            self._start(step)
        assert self._next is not None
        draws = self._next[1].result()
        self._start(step + 1)
        return draws

    def close(self) -> None:
        """End the thread after the draws in work."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _start(self, step: int) -> None:
        self._next = (step, self._thread.submit(self._draw, step))
