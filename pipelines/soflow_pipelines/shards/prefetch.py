"""Fetches the shards that are read next into the cache, in background threads."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Lock, Thread

from soflow_core.failures import InputError
from soflow_pipelines.shards.cache import LIMIT_VARIABLE
from soflow_pipelines.shards.order import SampleOrder
from soflow_pipelines.shards.reader import SampleReader
from soflow_pipelines.storage.object_store import LocationError

FETCHES = 4
"""Shards fetched at once."""


class WindowFetcher:
    """Fetches the shards of the window that is being read, and of the next one where both fit into the cache.

    A fetch that fails is not reported here: the read that needs the shard fetches it again and raises. The threads
    are daemons. Raises LocationError where the cache is smaller than a window.
    """

    def __init__(self, reader: SampleReader, order: SampleOrder) -> None:
        self._reader = reader
        self._order = order
        self._queue: SimpleQueue[int] = SimpleQueue()
        self._requested: deque[tuple[int, int]] = deque(maxlen=4)
        """The last windows whose shards were requested, as (epoch, window)."""
        self._lock = Lock()
        self._stop = Event()
        assert reader.cache is not None
        sizes = [shard.bytes for shard in reader.shards]
        window = max(sum(sizes[shard] for shard in shards) for shards in order.windows(0))
        if window > reader.cache.limit:
            raise LocationError(
                f"the cache {reader.cache.folder} may hold {reader.cache.limit / 1e9:.2f} GB, the samples are shuffled "
                f"over {window / 1e9:.2f} GB: set {LIMIT_VARIABLE} to at least {2 * window / 1e9:.1f}."
            )
        self._ahead = 2 * window <= reader.cache.limit
        self._threads = [Thread(target=self._work, name="shard-fetch", daemon=True) for _ in range(FETCHES)]
        for thread in self._threads:
            thread.start()

    def reach(self, position: int) -> None:
        """Requests the shards of this position's window, and of the next window."""
        epoch, window = self._order.window(position)
        self._request(epoch, window)
        if self._ahead:
            last = window + 1 == len(self._order.windows(epoch))
            self._request(*((epoch + 1, 0) if last else (epoch, window + 1)))

    def _request(self, epoch: int, window: int) -> None:
        with self._lock:
            if (epoch, window) in self._requested:
                return
            self._requested.append((epoch, window))
        for shard in self._order.windows(epoch)[window]:
            self._queue.put(shard)

    def _work(self) -> None:
        while True:
            shard = self._queue.get()
            if self._stop.is_set():
                return
            with suppress(InputError, OSError):
                self._reader.fetch(shard, self._stop)

    def close(self) -> None:
        """Ends the fetches and waits for the threads."""
        self._stop.set()
        for _ in self._threads:
            self._queue.put(0)
        for thread in self._threads:
            thread.join()
