"""Interface of the group of processes that score one network together."""

from __future__ import annotations

from typing import Any, Protocol


class Ranks(Protocol):
    """A group of processes (ranks) that evaluate one network: rank r makes batches r, r + world, r + 2 world, ...

    `gather` and `should_stop` are collective: every rank calls them equally often and in the same order.
    """

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def world(self) -> int:
        """Number of processes."""

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks in rank order, on every rank."""

    def should_stop(self) -> bool:
        """Whether to stop before the next batch; the same answer on every rank."""


class SingleProcess:
    """One process that scores the network alone and is not asked to stop."""

    rank = 0
    world = 1

    def gather(self, items: list[Any]) -> list[Any]:
        """The items."""
        return items

    def should_stop(self) -> bool:
        """False."""
        return False
