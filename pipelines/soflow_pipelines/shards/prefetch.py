"""soflow_pipelines.shards.prefetch"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from queue import SimpleQueue
from threading import Event, Lock, Thread

from soflow_pipelines.shards.cache import LIMIT_VARIABLE
from soflow_pipelines.shards.order import SampleOrder
from soflow_pipelines.shards.reader import SampleReader
from soflow_pipelines.storage.object_store import StorageError

FETCHES = 4


class WindowFetcher:
    """Fetches the shards of the window being read, and of the next one, in the background.

    A fetch that fails is not reported here: the read that needs the shard tries again and says so. The threads
    do not keep a process that ends.
    """

    def __init__(self, reader: SampleReader, order: SampleOrder) -> None:
        self._reader = reader
        self._order = order
        self._wanted: SimpleQueue[int] = SimpleQueue()
        self._asked: deque[tuple[int, int]] = deque(maxlen=4)
        self._lock = Lock()
        self._stop = Event()
        assert reader.cache is not None
        sizes = [shard.bytes for shard in reader.shards]
        window = max(sum(sizes[shard] for shard in shards) for shards in order.windows(0))
        if window > reader.cache.limit:
            raise StorageError(
                f"the cache {reader.cache.folder} may hold {reader.cache.limit / 1e9:.2f} GB, the samples are mixed "
                f"over {window / 1e9:.2f} GB: set {LIMIT_VARIABLE} to at least {2 * window / 1e9:.1f}."
            )
        self._ahead = 2 * window <= reader.cache.limit
        self._threads = [Thread(target=self._work, name="shard-fetch", daemon=True) for _ in range(FETCHES)]
        for thread in self._threads:
            thread.start()

    def reach(self, position: int) -> None:
        """Reading has come to this position."""
        epoch, window = self._order.window(position)
        self._ask(epoch, window)
        if self._ahead:
            last = window + 1 == len(self._order.windows(epoch))
            self._ask(*((epoch + 1, 0) if last else (epoch, window + 1)))

    def _ask(self, epoch: int, window: int) -> None:
        with self._lock:
            if (epoch, window) in self._asked:
                return
            self._asked.append((epoch, window))
        for shard in self._order.windows(epoch)[window]:
            self._wanted.put(shard)

    def _work(self) -> None:
        while True:
            shard = self._wanted.get()
            if self._stop.is_set():
                return
            with suppress(StorageError):
                self._reader.fetch(shard, self._stop)

    def close(self) -> None:
        """Ends the fetches and waits for the threads."""
        self._stop.set()
        for _ in self._threads:
            self._wanted.put(0)
        for thread in self._threads:
            thread.join()
