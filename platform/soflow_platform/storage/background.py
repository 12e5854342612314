"""Tasks that run one after the other in a background thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class BackgroundQueue:
    """Runs tasks in the order in which they are submitted, in one daemon thread.

    After a task has raised, waiting tasks are dropped, and so are new ones until `take_failure` is called. The thread is started
    by the first task and ended by `close` or `abandon`; a task that is submitted later starts a new one.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.cancelled = threading.Event()
        """Set by `abandon`: a task should not retry what fails."""
        self._changed = threading.Condition()
        self._tasks: deque[Callable[[], None]] = deque()
        """The task that runs and those that wait for it."""
        self._thread: threading.Thread | None = None
        self._closing = False
        self._failure: BaseException | None = None

    @property
    def failure(self) -> BaseException | None:
        """The exception of the task that failed."""
        return self._failure

    def take_failure(self) -> BaseException | None:
        """The exception of the task that failed. It is cleared, so that tasks are accepted again."""
        failure, self._failure = self._failure, None
        return failure

    def submit(self, task: Callable[[], None]) -> None:
        """Run `task` after those submitted before it."""
        with self._changed:
            if self._failure is not None:
                return
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self.name, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no task is left, for `timeout` seconds at most. Returns whether the queue is empty."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tasks, timeout)

    def close(self) -> None:
        """Wait for every task and end the thread. Raises the exception of a task that failed."""
        self._end_thread()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Set `cancelled`, wait for every task and end the thread; raises nothing."""
        self.cancelled.set()
        self._end_thread()

    def _end_thread(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._tasks)
            thread, self._thread = self._thread, None
            self._closing = thread is not None
            self._changed.notify_all()
        if thread is not None:
            thread.join()
            self._closing = False

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closing)
                if not self._tasks:
                    return
                task = self._tasks[0]
            failure: BaseException | None = None
            try:
                task()
            except BaseException as error:
                # An exception in a thread reaches no caller: `close` raises it, and `failure` returns it.
                failure = error
            # Release what the task refers to, such as a copy of the weights, before the next one comes.
            del task
            with self._changed:
                if failure is None:
                    self._tasks.popleft()
                else:
                    self._failure = failure
                    self._tasks.clear()
                self._changed.notify_all()
