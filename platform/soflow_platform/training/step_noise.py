"""The randomness of each step of a trial, made while the step before is still at work."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from soflow_core.objectives import Draws


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one optimizer step: a function of (seed, step), so that a checkpoint needs no generator state."""
    digest = hashlib.sha256(f"step {seed} {step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class StepNoisePrefetcher:
    """Hands out the draws of one step after the other.

    Every rank draws for the whole batch, which does not get shorter with more ranks: a thread does it while the device works.
    """

    def __init__(self, draw: Callable[[int], Draws]) -> None:
        """`draw` makes those of a step, and is called in another thread."""
        self._draw = draw
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draws")
        self._ahead: tuple[int, Future[Draws]] | None = None

    def take(self, step: int) -> Draws:
        """The draws of `step`; those of the next one are begun."""
        if self._ahead is None or self._ahead[0] != step:
            self._begin(step)
        assert self._ahead is not None
        draws = self._ahead[1].result()
        self._begin(step + 1)
        return draws

    def close(self) -> None:
        """Draw no more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _begin(self, step: int) -> None:
        self._ahead = (step, self._thread.submit(self._draw, step))
